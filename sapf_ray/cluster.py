"""Starting or joining Ray, quietly, and saying early what a cluster lacks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from sapf_ray.config import ClusterConfig, RunConfig
from sapf_ray.errors import ClusterError

# Of every process of a run. Freed memory is kept: glibc otherwise returns a large tensor's pages at once, and
# page faults then take up to half the time of element-wise layers on CPU.
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


def check(config: RunConfig) -> None:
    """Compares what the stages ask for with what the cluster has.

    Raises:
        ClusterError: Naming the field, what it asks and what there is.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    wants = (
        ("saliency.cpus_per_task", config.saliency.cpus_per_task, cpus, "CPUs"),
        ("saliency.gpus_per_task", config.saliency.gpus_per_task, gpus, "GPUs"),
        ("finetune.num_workers", config.finetune.num_workers * max(1.0, config.finetune.cpus_per_worker), cpus, "CPUs"),
        ("finetune.gpus_per_worker", config.finetune.num_workers * config.finetune.gpus_per_worker, gpus, "GPUs"),
        ("synthesis.cpus_per_actor", max(1, config.synthesis.num_actors) * config.synthesis.cpus_per_actor, cpus, "CPUs"),
        ("evaluation.cpus_per_task", config.evaluation.cpus_per_task, cpus, "CPUs"),
        ("evaluation.gpus_per_task", config.evaluation.gpus_per_task, gpus, "GPUs"),
        ("synthesis.gpus_per_actor", max(1, config.synthesis.num_actors) * config.synthesis.gpus_per_actor, gpus, "GPUs"),
    )
    for field, asked, available, unit in wants:
        if asked > available:
            raise ClusterError(f"{field}: asks for {asked:g} {unit} in all, the cluster has {available:g}")
