"""What a run leaves behind: no pixel, no file name, no key, wherever it writes."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.saliency.selection import _share_of
from tests.commands import call
from tests.conftest import PATIENT
from tests.data.folders import FOLDER_CASES, FolderCase, put

SEED = 5  # of the whole run's key
REFUSED = [case for case in FOLDER_CASES if case.words]


@pytest.fixture(scope="module")
def traces(plain_run, ray_files) -> tuple[Path, Path]:
    """All that a run wrote: its folder with MLflow's store and the terminal, and Ray's session."""
    out, _ = plain_run
    store = json.loads((out / "mlflow_run.json").read_text())["uri"]
    assert str(out.parent) in store
    return out.parent, ray_files


def files(*roots: Path) -> Iterator[Path]:
    for root in roots:
        yield from (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def found(secrets: dict[str, bytes], *roots: Path) -> list[str]:
    """``SECRET in FILE`` of each; names of files and folders count as well."""
    leaks = []
    for path in files(*roots):
        content = str(path).encode() + path.read_bytes()
        leaks += [f"{name} in {path}" for name, secret in secrets.items() if secret in content]
    return leaks


def secrets_of(folder: Path) -> dict[str, bytes]:
    """Names, encoded and decoded pixels of every image, and the key in both its forms."""
    key = NoiseKey.create(SEED)._key
    secrets = {"key": key, "key in hex": key.hex().encode(), "names": PATIENT.encode()}
    for path in files(folder):
        pixels = np.asarray(Image.open(path))
        secrets |= {
            f"file {path.name}": path.read_bytes()[-80:-16],
            f"pixels of {path.name}": pixels[0].tobytes(),
            f"float pixels of {path.name}": (pixels[0] / 127.5 - 1).astype(np.float32).tobytes(),
        }
    return secrets


def test_no_trace_of_an_image_or_the_key(folder, traces):
    home, session = traces
    assert sum(1 for _ in files(home)) > 20 and sum(1 for _ in files(session)) > 5
    assert found(secrets_of(folder), home, session) == []


@pytest.mark.parametrize("what", ["key in hex", "names", "pixels of patient-smith-000.png"])
def test_the_search_finds_what_is_there(folder, tmp_path, what):
    secret = secrets_of(folder)[what]
    (tmp_path / "log").write_bytes(b"before " + secret + b" after")
    assert f"{what} in {tmp_path / 'log'}" in found(secrets_of(folder), tmp_path)


def test_nobody_else_reads_a_run_directory(traces):
    home, _ = traces
    assert stat.S_IMODE((home / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "run" / "ledger.jsonl").stat().st_mode) == 0o600


def test_progress_does_not_tell_how_many_records_were_sampled():
    told: list[tuple[int, int]] = []
    for number, shards in enumerate((3, 0, 2)):
        show = _share_of(lambda *step: told.append(step), number, releases=3, sampled=True)
        for done in range(1, shards + 1):
            show(done, shards)
    assert told == [(1, 3), (3, 3)]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_refusal_is_told_on_the_terminal_alone(case: FolderCase, tmp_path, capsys):
    """What an error says may name a file; it is written nowhere."""
    images, home = tmp_path / "images", tmp_path / "home"
    images.mkdir()
    case.build(images)
    put(images, "zebra/patient-smith-1.png", content=b"no image")
    settings = [f"--data.{key}={value}" for key, value in case.settings.items()]
    code, _, said = call(
        capsys,
        "run",
        f"--data.path={images / case.inside}",
        "--data.source=image_folder",
        "--model.path=glyphs-tiny",
        f"--tracking.uri=sqlite:///{home / 'mlflow.db'}",
        f"--out={home / 'run'}",
        *settings,
    )
    assert code == 2 and said.count("\n") == 1, said
    names = {path.name for path in files(images) if path.suffix == ".png"}
    texts = [path.read_bytes() for path in files(home)]
    assert not [name for name in names if any(name.encode() in text for text in texts)]
