"""Starting or joining Ray, quietly, and saying early what a cluster lacks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from sapf_ray.config import ClusterConfig, FinetuneConfig, RunConfig
from sapf_ray.errors import ClusterError, SapfError, is_environments, reason
from sapf_ray.registry import PLUGINS
from sapf_ray.runs import probes, runlog, worktime

T = TypeVar("T")

# Environment of every process of a run. Freed memory is kept: glibc otherwise returns a large
# tensor's pages at once, and every reuse pays page faults (5 % of a forward pass of the bundled
# U-Net, measured on one idle core).
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon the end of training is seen
    "RAY_DEDUP_LOGS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config keep their meaning in workers
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
# A single machine gives no notice before it goes, and its processes inherit this one's
# environment: a runtime_env would cost each of them half a second.
LOCAL_ENVIRONMENT = ENVIRONMENT | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

# To find out that nothing listens at an address; Ray itself tries for minutes.
CONNECT_SECONDS = 5.0
# For every node to look into the run directory.
# Tasks and actors that do not talk to each other go over all nodes, not to one node first.
SPREAD = "SPREAD"


@contextlib.contextmanager
def session(config: ClusterConfig, *, spills: Path | None = None) -> Iterator[None]:
    """Joins the cluster at ``config.address`` or RAY_ADDRESS, or starts a local Ray; leaves a Ray
    that was already up alone.

    Args:
        config: Address, and cores of a local Ray.
        spills: Folder for what passes between the processes of a local Ray and does not fit in
            memory, latents and the run's secret key among it; empty before, gone afterwards. By
            default it goes to Ray's temporary folder. A cluster spills where its nodes were told.

    Raises:
        ClusterError: The address does not answer, another version of Ray or Python runs there, or a
            local Ray cannot start.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _reachable(address)
    else:
        probes.temporary_folder()
        probes.ensure_token_place()
    for name, value in (ENVIRONMENT if address else LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    with probes.spilling(None if address else spills) as spilling:
        _start(config, address, spilling=spilling)
        for name in ("ray.train", "ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        except KeyboardInterrupt:
            # A thread of the stage may still be inside Ray, and tearing Ray down under it can
            # crash: what was started here ends with the process.
            raise
        except BaseException:
            ray.shutdown()
            raise
        ray.shutdown()


def _start(config: ClusterConfig, address: str | None, *, spilling: dict[str, Any]) -> None:
    """``ray.init``, its errors in one line."""
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else config.num_cpus,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            runtime_env={"env_vars": _worker_environment()} if address else None,
            **spilling,
        )
    except Exception as error:  # a node that starts too late is Ray's bare Exception
        if not address:
            raise ClusterError(
                f"Ray does not start on this machine ({reason(error)}); the same command tries "
                "again, `sapf doctor` looks for the cause"
            ) from error
        raise ClusterError(f"cluster.address = {address!r}: {_why_not(error)}") from error


def _worker_environment() -> dict[str, str]:
    """Variables of worker processes that do not inherit this process's environment."""
    plugins = os.environ.get(PLUGINS)
    return ENVIRONMENT | ({PLUGINS: plugins} if plugins else {})


def _reachable(address: str) -> None:
    """Tries the port of a ``host:port`` address; ``auto`` and ``local`` have none.

    Raises:
        ClusterError: Nothing listens there, or it is the address of another protocol.
    """
    field = f"cluster.address = {address!r}"
    if "://" in address:
        raise ClusterError(
            f"{field}: Ray Client and job server addresses cannot carry a run, whose driver writes "
            "the ledger where the workers can see it; use `sapf submit` (jobs/README.md), or "
            "host:6379 from a machine of the cluster"
        )
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"{field}: nothing answers there ({reason(error)}); start Ray with `ray start --head`, "
            "correct the address, or leave it out to start a local one"
        ) from error


def _why_not(error: Exception) -> str:
    """Why ``ray.init`` failed, in one line."""
    text = str(error)
    versions = [number for _, number in re.findall(r"(Ray|Python): (\S+)", text)]
    if "Version mismatch" not in text or len(versions) != 4:
        return f"no Ray answers there ({reason(error)}); leave it out to start a local one"
    ray_there, python_there, ray_here, python_here = versions
    return (
        f"the cluster runs Ray {ray_there} on Python {python_there}, this process Ray {ray_here} "
        f"on Python {python_here}; install the same versions on both"
    )


def result(reference: ray.ObjectRef) -> Any:
    """``ray.get``; the times of :func:`sapf_ray.runs.worktime.timed` work go to the stage that is
    under way, and a user's error inside the task or actor is raised as itself, in one line.

    Raises:
        ClusterError: The work was lost more often than Ray retries it (machines or workers that
            keep dying).
    """
    try:
        value = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, SapfError) or is_environments(error.cause):
            raise error.cause from None
        raise
    except RayError as error:
        runlog.event("work_lost", runlog.ERROR, error=type(error).__name__)
        raise ClusterError(
            f"work was lost and repeating it did not help ({reason(error)}); finished work is "
            "kept, the same command goes on"
        ) from error
    if not isinstance(value, worktime.Worked):
        return value
    worktime.add([value.interval])
    if value.attempt > 0:
        runlog.event("task_retried", runlog.WARNING, attempt=value.attempt)
    return value.value


def as_finished(
    submit: Callable[[T], ray.ObjectRef], items: Iterable[T], *, window: int
) -> Iterator[tuple[T, Any]]:
    """Yields every item with the result of its task, in the order in which tasks finish.

    At most ``window`` items are submitted and not yet yielded, so what driver and object store hold
    does not grow with their number, not even where one of them is late.

    Args:
        submit: Starts an item's task.
        items: What there is to do.
        window: See :func:`in_flight`.

    Raises:
        ClusterError: See :func:`result`.
    """
    waiting = iter(items)
    running: dict[ray.ObjectRef, T] = {}
    while True:
        for item in itertools.islice(waiting, window - len(running)):
            running[submit(item)] = item
        if not running:
            return
        (ready,), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(ready)
        yield item, result(ready)


def in_flight(cpus: float, gpus: float = 0.0) -> int:
    """Number of tasks of this size to have submitted at a time.

    Enough that no worker waits for the driver, and that a late task does not soon stop the others.
    """
    return max(32, 4 * room(cpus, gpus))


@dataclass(frozen=True, kw_only=True)
class Want:
    """What a stage requests: equal units (tasks, workers, actors) at the same time, each on one
    node.

    Attributes:
        section: Section of the config that sets it.
        unit: End of the fields that set a unit's size: ``cpus_per_<unit>``, ``gpus_per_<unit>``.
        count: Number of units.
        cpus: Cores of a unit.
        gpus: GPUs of a unit.
    """

    section: str
    unit: str
    count: int
    cpus: float
    gpus: float


def finetune_want(config: FinetuneConfig) -> Want:
    """What training's workers request; each of them at least one core."""
    return Want(
        section="finetune",
        unit="worker",
        count=config.workers,
        cpus=max(1.0, config.cpus_per_worker),
        gpus=config.gpus,
    )


def room(cpus: float, gpus: float = 0.0) -> int:
    """Number of units of this size that the live nodes hold together.

    A unit never spans two nodes.
    """
    requested = {kind: each for kind, each in (("CPU", cpus), ("GPU", gpus)) if each > 0}

    def fitting(node: dict[str, Any]) -> int:
        have = node["Resources"]
        return int(min(have.get(kind, 0.0) / each + 1e-9 for kind, each in requested.items()))

    return sum(fitting(node) for node in ray.nodes() if node["Alive"])


def worker_cpus(config: FinetuneConfig, runs: int = 1) -> float:
    """Cores of a train worker: the configured ones, or as many as let all workers fit at once.

    Args:
        config: Settings of fine-tuning.
        runs: Number of equal runs at the same time.
    """
    if config.cpus_per_worker:
        return config.cpus_per_worker
    workers = runs * config.workers
    most = int(ray.cluster_resources().get("CPU", 1.0)) // workers
    for cores in range(most, 1, -1):
        if room(cores, config.gpus) >= workers:
            return float(cores)
    return 1.0


def require(wants: list[Want]) -> None:
    """Compares what is requested with what the cluster has, in all and node by node.

    Raises:
        ClusterError: Naming the field, what it requests and what there is.
    """
    have = ray.cluster_resources()
    for want in wants:
        for kind, each in (("CPU", want.cpus), ("GPU", want.gpus)):
            requested = want.count * each
            available = have.get(kind, 0.0)
            if requested > available:
                raise ClusterError(
                    f"{want.section}.{kind.lower()}s_per_{want.unit}: asks for {requested:g} "
                    f"{kind}s in all, the cluster has {available:g}"
                )
        fit = room(want.cpus, want.gpus)
        if fit < want.count:
            raise ClusterError(
                f"{want.section}.cpus_per_{want.unit}: {want.count} x ({want.cpus:g} CPUs, "
                f"{want.gpus:g} GPUs) are asked, the cluster's nodes have room for {fit}, for each "
                "must fit on one node; ask for smaller ones"
            )


def wants(config: RunConfig) -> list[Want]:
    """What each stage of a run requests; one stage runs at a time."""
    scores = _task_want(
        "evaluation",
        cpus=config.evaluation.cpus_per_task or 1.0,
        gpus=config.evaluation.gpus,
    )
    if config.evolution.enabled:
        evolution = config.evolution
        return [
            _task_want("evolution", cpus=evolution.cpus_per_task, gpus=evolution.gpus),
            scores,
        ]
    saliency = config.saliency
    actors = Want(
        section="synthesis",
        unit="actor",
        count=max(1, config.synthesis.num_actors),
        cpus=config.synthesis.cpus_per_actor,
        gpus=config.synthesis.gpus,
    )
    return [
        _task_want("saliency", cpus=saliency.cpus_per_task, gpus=saliency.gpus),
        finetune_want(config.finetune),
        actors,
        scores,
    ]


def _task_want(section: str, *, cpus: float, gpus: float) -> Want:
    """One task of a stage at a time is enough for it to get on."""
    return Want(section=section, unit="task", count=1, cpus=cpus, gpus=gpus)


def check(config: RunConfig) -> None:
    """:func:`require` for every stage of a run."""
    require(wants(config))
