"""Evaluation as Ray tasks: the FID and each classifier at the same time, wherever the cluster has
room.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.evaluation.protocol import evaluate
from sapf_ray.models.device import pick_device
from sapf_ray.runs import worktime

FIDELITY = "fidelity"
MOST_CPUS = 8.0


@ray.remote(max_retries=3)
def _score(
    part: str,
    synthetic_dir: str,
    source: ImageSource,
    resolution: int,
    config: EvaluationConfig,
    seed: int,
    cpus: float,
) -> worktime.Worked:
    torch.set_num_threads(max(1, int(cpus)))
    if part == FIDELITY:
        importlib.import_module("sapf_ray.evaluation.fidelity")  # seconds, and no work
    else:
        config = replace(config, classifiers=[part])
    return worktime.timed(evaluate)(
        synthetic_dir,
        source,
        resolution,
        config,
        seed,
        pick_device(config.gpus_per_task),
        config.cache_dir,
        fidelity=part == FIDELITY,
        accuracy=part != FIDELITY,
    )


def evaluate_on_cluster(
    synthetic_dir: Path | str,
    source: ImageSource,
    *,
    resolution: int,
    config: EvaluationConfig,
    seed: int,
) -> dict[str, float]:
    """:func:`evaluate`, one Ray task per classifier and one for the FID.

    Raises:
        SapfError: As :func:`evaluate`.
    """
    # small networks, small batches: more than a few cores would wait for each other
    node = max(n["Resources"].get("CPU", 1.0) for n in ray.nodes() if n["Alive"])
    cpus = config.cpus_per_task or min(node, MOST_CPUS)
    task = _score.options(
        name="evaluate",
        num_cpus=cpus,
        num_gpus=config.gpus_per_task,
        scheduling_strategy=cluster.SPREAD,
    )
    source_ref = ray.put(source)
    # classifiers first: they take longest
    parts = [*dict.fromkeys(config.classifiers), FIDELITY]
    refs = [
        task.remote(part, str(synthetic_dir), source_ref, resolution, config, seed, cpus)
        for part in parts
    ]
    scores: dict[str, float] = {}
    for ref in refs:
        scores |= cluster.result(ref)
    accuracies = [scores[f"accuracy_{name}"] for name in dict.fromkeys(config.classifiers)]
    return scores | {"accuracy": float(np.mean(accuracies))}
