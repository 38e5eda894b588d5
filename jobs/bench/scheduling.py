"""What the orchestrator itself costs.

Selection's fan-out and synthesis's queue over work that does nothing.

The driver's code is the product's own (:func:`sapf_ray.saliency.selection.exact_sum`,
:func:`sapf_ray.synthesis.launcher._run_queue`); only the task and the actor are empty, so all of
the time is scheduling.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from jobs.bench.figures import Spread, spread
from jobs.bench.process import Log
from sapf_ray import cluster
from sapf_ray.config import (
    ClusterConfig,
    ModelConfig,
    SaliencyConfig,
    SynthesisConfig,
)
from sapf_ray.latents import LatentCache
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.runs.worktime import timed
from sapf_ray.saliency.selection import Pass, exact_sum
from sapf_ray.synthesis.launcher import SamplingJob, _run_queue
from sapf_ray.synthesis.sampling_plan import SamplingPlan, Shard

SHARDS = 1000
CHUNKS = 200
QUICK = (40, 12)
CPUS = 2


def empty_task(size: int) -> Any:
    """In place of a shard's scoring: every shard's sum is ``size`` ones."""

    @ray.remote(max_retries=3)
    @timed
    def score_nothing(*arguments: Any) -> ExactSum:
        return ExactSum.of([torch.ones(size, dtype=torch.int64)], 1.0)

    return score_nothing


def fan_out(
    shards: int,
    size: int = 60,
    *,
    task: Any = None,
    on_shard: Callable[[], None] = lambda: None,
) -> ExactSum:
    """Selection's sum over ``shards`` shards of one record each.

    Args:
        size: Matrices of the pool.
        task: See :func:`empty_task`; by default that.
        on_shard: Called for each shard, when it has been added.

    Returns:
        The sum: ``size`` times the number of shards.
    """
    work = Pass(
        model=ModelConfig(),
        cache=LatentCache("none"),
        config=SaliencyConfig(shard_size=1),
        key=NoiseKey.create(0),
    )
    return exact_sum(
        np.arange(shards),
        work,
        zero=ExactSum.zeros([(size,)], 1.0),
        on_shard=lambda done, total: on_shard(),
        task=empty_task(size) if task is None else task,
    )


class EmptyActor:
    """In place of a sampling actor."""

    def __init__(self, job: SamplingJob) -> None:
        pass

    @timed
    def make_shard(self, shard: Shard) -> tuple[int, float]:
        return shard.rows, 0.0


def queue(chunks: int) -> list[float]:
    """``time.monotonic()`` at which each chunk came back from the actors, in order."""
    config = SynthesisConfig(n_images=chunks, shard_size=1)
    plan = SamplingPlan(
        n_images=chunks,
        n_classes=1,
        shard_size=1,
        seed=0,
    )
    job = SamplingJob(
        out_dir="none",
        model=ModelConfig(),
        adapter_dir=None,
        class_names=("a",),
        prompts=("a",),
        config=config,
        plan=plan,
        spec="",
    )
    return [
        time.monotonic() for _ in _run_queue(job, list(plan.shards), count=CPUS, kind=EmptyActor)
    ]


def run(
    repeats: int,
    *,
    quick: bool,
    log: Log,
) -> dict[str, Spread]:
    """Milliseconds per shard of the selection and per chunk of the synthesis.

    Measured on one local Ray of two cores, once its workers are up and have their libraries.
    """
    shards, chunks = QUICK if quick else (SHARDS, CHUNKS)
    log(f"scheduling: {shards} empty shards, {chunks} empty chunks, {CPUS} cores")
    milliseconds: dict[str, list[float]] = {"shard": [], "chunk": []}
    with cluster.session(ClusterConfig(num_cpus=CPUS)):
        fan_out(8)  # starts the worker processes
        for _ in range(repeats):
            done: list[float] = []
            fan_out(shards, on_shard=lambda: done.append(time.monotonic()))  # noqa: B023 called in this round
            for kind, times in (
                ("shard", done),
                ("chunk", queue(chunks)[2 * CPUS :]),
            ):  # the first wait for the actors' start
                milliseconds[kind].append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
            log(
                "  "
                + ", ".join(
                    f"{values[-1]:.2f} ms a {kind}" for kind, values in milliseconds.items()
                )
            )
    return {f"scheduling_ms_per_{kind}": spread(values) for kind, values in milliseconds.items()}
