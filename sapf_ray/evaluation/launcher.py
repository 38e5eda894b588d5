"""Evaluation as Ray tasks: all metrics at the same time, wherever the cluster has room."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
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


@ray.remote(max_retries=3)
def _score(compute: Callable[[Inputs], Score], inputs: Inputs, cpus: float) -> worktime.Worked:
    torch.set_num_threads(max(1, int(cpus)))
    if REFERENCE in inputs.reads:
        importlib.import_module("sapf_ray.evaluation.fidelity")  # seconds, and no work
    device = pick_device(inputs.config.gpus)
    return worktime.timed(compute)(dataclasses.replace(inputs, device=device))


def evaluate_on_cluster(
    synthetic_dir: Path | str,
    source: ImageSource,
    *,
    resolution: int,
    config: EvaluationConfig,
    seed: int,
    known: Mapping[str, float] | None = None,
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

    Raises:
        SapfError: As :func:`sapf_ray.evaluation.protocol.evaluate`.
    """
    inputs = Inputs(
        synthetic_dir=str(synthetic_dir),
        source=source,
        resolution=resolution,
        config=config,
        seed=seed,
    )
    inputs.check_classes()
    scores = dict(known or {})
    # small networks, small batches: more than a few cores would wait for each other
    node = max(n["Resources"].get("CPU", 1.0) for n in ray.nodes() if n["Alive"])
    cpus = config.cpus_per_task or min(node, MOST_CPUS)
    task = _score.options(
        name="evaluate",
        num_cpus=cpus,
        num_gpus=config.gpus,
        scheduling_strategy=cluster.SPREAD,
    )
    pending = {}
    for name, metric in requested(config).items():
        if metric.compute is None or name in scores:
            continue
        readable = inputs.restricted_to(metric.reads)
        if metric.cheap:
            scores |= named(name, metric.compute(readable))
        else:
            pending[name] = task.remote(metric.compute, readable, cpus)
    for name, reference in pending.items():
        scores |= named(name, cluster.result(reference))
    return combined(scores, config)
