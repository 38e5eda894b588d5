"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# read when torch, Ray and the hub client are imported
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that spin at barriers are 7x slower on a busy machine
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# no test leaves a secret in the home of whoever runs it
os.environ["SAPF_IMAGES_SECRET"] = os.path.join(tempfile.mkdtemp(prefix="sapf"), "images_secret")

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import save_tiny_pipeline
from tests.whole_run import ONE_CORE, command, finish

# Tensors here are tiny: a second thread costs more in waiting than it brings, much more on a busy
# machine.
torch.set_num_threads(1)

PATIENT = "patient-smith"
"""What names of the sensitive files begin with."""

# --doctest-modules would import them, and each adds its row to a table of the whole process
collect_ignore = ["plugins"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``-n 2 --dist loadgroup``: one process has all that shares the session's Ray.

    So there is one such Ray, whose workers stay warm. A file's tests stay together, for they share
    what its fixtures made. What interrupts whole runs takes as long as all others on Ray, so the
    other process has it, with a Ray of its own. The wheel's commands start a Ray of their own too.
    """
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    for item in items:
        group = item.path.stem
        if group in ("test_pipeline", "test_interrupted", "test_leaks"):
            group = "whole_runs"
        elif item.path in on_ray:
            group = "ray"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of 2 cores for the whole session; quiet, without dashboard."""
    import ray

    from sapf_ray.cluster import LOCAL_ENVIRONMENT

    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",  # never a cluster that someone else started on this machine
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a diffusers pipeline with random weights: 8x8 images, 4x4x4 latents."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of PNGs, 20x28 pixels: another size than the model's."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark_cell", "bright_cell")):
        (root / name).mkdir()
        for i in range(40):
            pixels = generator.integers(0, 100, (28, 20, 3)) + 150 * label
            file = root / name / f"{PATIENT}-{label}{i:02d}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="session")
def ray_files() -> Iterator[Path]:
    """Where the Ray of :func:`plain_run` writes; of a short name, for its sockets' sake."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def plain_run(
    folder: Path, tiny_pipeline: Path, ray_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole run with evaluation and tracking: its directory, and what it printed."""
    home = tmp_path_factory.mktemp("plain")
    words = command(folder, tiny_pipeline, home / "run", *ONE_CORE)
    printed = finish(words, RAY_TMPDIR=str(ray_files))
    (home / "terminal").write_text(printed, encoding="utf-8")
    return home / "run", printed
