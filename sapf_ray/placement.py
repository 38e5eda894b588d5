"""Where stages run: what a config leaves to ``auto`` becomes numbers once the cluster is known.

One GPU for each train worker and task, as many workers as there are GPUs, two sampling actors on a
GPU that holds two models; the CPU where the cluster has no GPU. None of it changes a result.

>>> from sapf_ray.config import RunConfig
>>> config = placed(RunConfig(), Gpus(count=4), model_gb=3.0)
>>> config.finetune.workers, config.saliency.gpus, config.synthesis.gpus
(4, 1.0, 1.0)
>>> words(config).split("; ")[:2]
['selection 1 GPU a task', 'fine-tuning 4 workers x 1 GPU']
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import Any

import ray

from sapf_ray.config import RunConfig

ROOM = 0.8
"""Share of a GPU's memory that models may fill; the rest is for activations that vary."""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """GPUs that a run may use.

    Attributes:
        count: Number in the whole cluster.
        memory_gb: Memory of the smallest in 10^9 bytes; None where it is not known.
    """

    count: int
    memory_gb: float | None = None


def expected_gpus(config: RunConfig) -> Gpus:
    """Those that a run will find, as far as is known before it starts Ray: this machine's; one
    where a cluster is to be joined, of which nothing is known yet.
    """
    if ray.is_initialized():
        return cluster_gpus()
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return Gpus(count=1)
    import torch

    return Gpus(count=torch.cuda.device_count())


def cluster_gpus() -> Gpus:
    """Those of Ray's cluster; memory is known where this machine is all of it."""
    count = int(ray.cluster_resources().get("GPU", 0.0))
    names = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if not count or names != {socket.gethostname()}:
        return Gpus(count=count)
    return Gpus(count=count, memory_gb=_least_memory_gb())


def _least_memory_gb() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(d).total_memory for d in devices) / 1e9


def placed(config: RunConfig, gpus: Gpus, *, model_gb: float) -> RunConfig:
    """The config with numbers for every ``auto``.

    Args:
        config: The run.
        gpus: Of the cluster.
        model_gb: Memory that sampling with one copy of the model takes, in 10^9 bytes.
    """
    one = 1.0 if gpus.count else 0.0
    two_fit = gpus.memory_gb is not None and 2 * model_gb <= ROOM * gpus.memory_gb
    actor = one / 2 if two_fit else one
    finetune: dict[str, Any] = {}
    if config.finetune.gpus_per_worker is None:
        finetune["gpus_per_worker"] = one
    if config.finetune.num_workers is None:
        each = finetune.get("gpus_per_worker", config.finetune.gpus)
        finetune["num_workers"] = max(1, int(gpus.count // each)) if each else 1
    synthesis = config.synthesis
    if synthesis.gpus_per_actor is None:
        synthesis = replace(synthesis, gpus_per_actor=actor)
    return replace(
        config,
        saliency=_with_gpus(config.saliency, one),
        finetune=replace(config.finetune, **finetune),
        evolution=_with_gpus(config.evolution, one),
        synthesis=synthesis,
        evaluation=_with_gpus(config.evaluation, one),
    )


def _with_gpus(section: Any, gpus: float) -> Any:
    """A section with this many GPUs a task, where it leaves that open."""
    return section if section.gpus_per_task is not None else replace(section, gpus_per_task=gpus)


def words(config: RunConfig) -> str:
    """The placement of a run in one line."""
    parts = {}
    if config.evolution.enabled:
        parts["evolution"] = f"{_device(config.evolution.gpus)} a task"
    else:
        finetune = config.finetune
        if finetune.steps:
            workers = f"{finetune.workers} worker{'s' * (finetune.workers != 1)}"
            parts["selection"] = f"{_device(config.saliency.gpus)} a task"
            parts["fine-tuning"] = f"{workers} x {_device(finetune.gpus)}"
        parts["synthesis"] = f"{_device(config.synthesis.gpus)} an actor"
    if config.evaluation.enabled:
        parts["scores"] = f"{_device(config.evaluation.gpus)} a task"
    return "; ".join(f"{stage} {text}" for stage, text in parts.items())


def gpu_settings(config: RunConfig) -> dict[str, float]:
    """GPUs of a task, worker or actor, by the setting's name; 0 while ``auto`` is not placed."""
    return {
        "saliency.gpus_per_task": config.saliency.gpus,
        "finetune.gpus_per_worker": config.finetune.gpus,
        "evolution.gpus_per_task": config.evolution.gpus,
        "synthesis.gpus_per_actor": config.synthesis.gpus,
        "evaluation.gpus_per_task": config.evaluation.gpus,
    }


def idle_gpus(config: RunConfig, gpus: Gpus) -> str | None:
    """A warning where a stage takes no GPU though the cluster has some; None where none does."""
    of_evolution = "evolution.gpus_per_task"
    without = [
        key
        for key, value in gpu_settings(config).items()
        if value == 0 and (key == of_evolution) == config.evolution.enabled
    ]
    if not gpus.count or not without:
        return None
    return (
        f"warning: the cluster has {gpus.count} GPU{'s' * (gpus.count != 1)}, but "
        f"{', '.join(without)} is 0: that runs on CPUs; leave it out, or auto"
    )


def _device(gpus: float) -> str:
    return f"{gpus:g} GPU{'s' * (gpus > 1)}" if gpus else "CPU"
