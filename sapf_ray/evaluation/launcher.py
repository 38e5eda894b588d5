"""Evaluation as Ray tasks: all metrics at the same time, wherever the cluster has room."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.evaluation.inputs import REFERENCE, Inputs
from sapf_ray.evaluation.metrics import Score, named, requested
from sapf_ray.evaluation.protocol import combined
from sapf_ray.models.device import pick_device
from sapf_ray.runs import worktime

MOST_CPUS = 8.0


Work = list[tuple[str, Callable[[Inputs], Score], tuple[str, ...]]]
"""Names of metrics, what computes them and what they read."""


@ray.remote(max_retries=3)
def _score(work: Work, inputs: Inputs, cpus: float) -> worktime.Worked:
    torch.set_num_threads(max(1, int(cpus)))
    if any(REFERENCE in reads for _, _, reads in work):
        importlib.import_module("sapf_ray.evaluation.set_values")  # seconds, and no work
    device = pick_device(inputs.config.gpus)
    return worktime.timed(_computed)(work, dataclasses.replace(inputs, device=device))


def _computed(work: Work, inputs: Inputs) -> dict[str, float]:
    """The scores of metrics that share what they read."""
    scores: dict[str, float] = {}
    for name, compute, reads in work:
        scores |= named(name, compute(inputs.restricted_to(reads)))
    return scores


def evaluate_on_cluster(
    synthetic_dir: Path | str,
    source: ImageSource,
    *,
    resolution: int,
    config: EvaluationConfig,
    seed: int,
    known: Mapping[str, float] | None = None,
    work: Path | None = None,
) -> dict[str, float]:
    """:func:`sapf_ray.evaluation.protocol.evaluate`, one Ray task per metric.

    Args:
        synthetic_dir: As :class:`Inputs`, like the next four.
        source: The real images.
        resolution: Side in pixels.
        config: Settings of the evaluation.
        seed: Seed.
        known: Scores of an earlier start of the run, which are kept; only missing ones are
            computed.
        work: Folder of the decoded images, which all tasks see; made, and removed at the end.
            Without, each task decodes what it reads for itself.

    Raises:
        SapfError: As :func:`sapf_ray.evaluation.protocol.evaluate`.
    """
    inputs = Inputs(
        synthetic_dir=str(synthetic_dir),
        source=source,
        resolution=resolution,
        config=config,
        seed=seed,
        work=None if work is None else str(work.resolve()),
    )
    inputs.check_classes()
    with _folder(work):
        scores = _scores(inputs, dict(known or {}))
    return combined(scores, config)


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[None]:
    """A folder that is not there before nor after, whatever a killed start left in it."""
    if work is None:
        yield
        return
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(exist_ok=True, mode=0o700)
    work.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # there is something else in it
            work.parent.rmdir()


def _scores(inputs: Inputs, scores: dict[str, float]) -> dict[str, float]:
    """The scores known, and those that tasks compute."""
    config = inputs.config
    # small networks, small batches: more than a few cores would wait for each other
    node = max(n["Resources"].get("CPU", 1.0) for n in ray.nodes() if n["Alive"])
    cpus = config.cpus_per_task or min(node, MOST_CPUS)
    task = _score.options(
        name="evaluate",
        num_cpus=cpus,
        num_gpus=config.gpus,
        scheduling_strategy=cluster.SPREAD,
    )
    works: dict[str, Work] = {}
    for name, metric in requested(config).items():
        if metric.compute is None or name in scores:
            continue
        if metric.cheap:
            scores |= named(name, metric.compute(inputs.restricted_to(metric.reads)))
        else:
            works.setdefault(metric.work or name, []).append((name, metric.compute, metric.reads))
    pending = [task.remote(work, inputs, cpus) for work in works.values()]
    for reference in pending:
        scores |= cluster.result(reference)
    return scores
