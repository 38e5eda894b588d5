"""Starting or joining Ray, quietly, and saying early what a cluster lacks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from sapf_ray.config import ClusterConfig, FinetuneConfig, RunConfig
from sapf_ray.errors import ClusterError, SapfError

# Of every process of a run. Freed memory is kept: glibc otherwise returns a large tensor's pages at once, and every
# reuse pays page faults (5 % of a forward pass of the bundled U-Net, measured on one idle core).
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config keep their meaning in workers
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}


@contextlib.contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Joins the cluster at ``config.address``, or starts a local Ray; leaves a Ray that was already up alone.

    Raises:
        ClusterError: The address does not answer.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address=config.address or "local", num_cpus=None if config.address else config.num_cpus,
            include_dashboard=None if config.address else False, log_to_driver=False,
            logging_level=logging.ERROR, configure_logging=True,
            runtime_env={"env_vars": ENVIRONMENT},
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ClusterError(
            f"cluster.address = {config.address!r}: no Ray answers there ({str(error).strip().splitlines()[0]}); "
            "leave it out to start a local one"
        ) from error
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def result(reference: ray.ObjectRef) -> Any:
    """``ray.get``; a user's error inside the task or actor is raised as itself, in one line."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, SapfError):
            raise error.cause from None
        raise


Want = tuple[str, float, str]  # field, amount in all, CPU or GPU


def finetune_wants(config: FinetuneConfig) -> list[Want]:
    """What training's workers ask for together; each of them at least one core."""
    return [
        ("finetune.num_workers", config.num_workers * max(1.0, config.cpus_per_worker), "CPU"),
        ("finetune.gpus_per_worker", config.num_workers * config.gpus_per_worker, "GPU"),
    ]


def require(wants: list[Want]) -> None:
    """Compares what is asked for with what the cluster has.

    Raises:
        ClusterError: Naming the field, what it asks and what there is.
    """
    have = ray.cluster_resources()
    for field, asked, unit in wants:
        available = have.get(unit, 0.0)
        if asked > available:
            raise ClusterError(f"{field}: asks for {asked:g} {unit}s in all, the cluster has {available:g}")


def check(config: RunConfig) -> None:
    """:func:`require` for every stage of a run."""
    saliency, synthesis, evaluation = config.saliency, config.synthesis, config.evaluation
    actors = max(1, synthesis.num_actors)
    require([
        ("saliency.cpus_per_task", saliency.cpus_per_task, "CPU"),
        ("saliency.gpus_per_task", saliency.gpus_per_task, "GPU"),
        *finetune_wants(config.finetune),
        ("synthesis.cpus_per_actor", actors * synthesis.cpus_per_actor, "CPU"),
        ("synthesis.gpus_per_actor", actors * synthesis.gpus_per_actor, "GPU"),
        ("evaluation.cpus_per_task", evaluation.cpus_per_task, "CPU"),
        ("evaluation.gpus_per_task", evaluation.gpus_per_task, "GPU"),
    ])
