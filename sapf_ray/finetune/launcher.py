"""Fine-tuning as a Ray Train run: any number of workers, checkpoints, restarts by Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.cloudpickle as cloudpickle
import ray.train
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sapf_ray import cluster
from sapf_ray.errors import ClusterError, SapfError, reason
from sapf_ray.files import below
from sapf_ray.finetune.checkpoints import check_paid, latest_state, repair_snapshot
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.finetune.restarts import RestartEvents, users_error
from sapf_ray.finetune.worker import run_worker
from sapf_ray.runs import runlog, worktime
from sapf_ray.runs.background import in_background

RUN_NAME = "finetune"
# that the cluster may be too small for the workers (a node that restarts) before training gives up
LOST_SECONDS = 120.0


def finetune(
    job: FinetuneJob,
    storage: Path | str,
    *,
    adapter_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Trains the adapter, continuing from the last checkpoint.

    Args:
        job: The work.
        storage: Folder of checkpoints, or the URI of one.
        adapter_dir: Where the adapter is written.
        on_progress: Called with the number of steps taken and that of all steps.

    Raises:
        ClusterError: The cluster cannot hold the workers.
        BudgetError: A step would have passed the planned epsilon.
        RunDirectoryError: The checkpoint contains steps that the ledger does not show.
    """
    cluster.require([cluster.finetune_want(job.config)])
    cpus = cluster.worker_cpus(job.config)
    root = str(storage.resolve()) if isinstance(storage, Path) else storage
    checkpoints = below(root, RUN_NAME)
    earlier = latest_state(checkpoints)
    releaser = job.releaser()
    check_paid(earlier, releaser.ledger, run_id=releaser.run_id)
    if earlier is not None:
        runlog.event("stage_resumed", step=earlier.step)
    repair_snapshot(checkpoints)
    callbacks: list[Any] = [RestartEvents(runlog.here(), job.config.max_failures)]
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # annotated for functions that return nothing
        train_loop_config={
            "job": cloudpickle.dumps(job),
            "cpus": cpus,
            "storage": checkpoints,
            "adapter": str(adapter_dir.resolve()),
        },
        torch_config=TorchConfig(backend="nccl" if job.config.gpus > 0 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.config.workers,
            use_gpu=job.config.gpus > 0,
            resources_per_worker={"CPU": cpus}
            | ({"GPU": job.config.gpus} if job.config.gpus > 0 else {}),
            placement_strategy="PACK",  # workers exchange gradients at every step
        ),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=root,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=job.config.max_failures),
            callbacks=callbacks,
        ),
    )
    with _LedgerProgress(Path(job.ledger), job.config.steps, callback=on_progress):
        try:
            worktime.add(_fit(trainer, replace(cluster.finetune_want(job.config), cpus=cpus)))
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
        except RayError as error:
            raise ClusterError(
                f"fine-tuning lost Ray's controller ({reason(error)}); nothing is "
                "lost, the same command goes on"
            ) from error
    if not adapter_dir.exists():
        raise SapfError(
            f"{adapter_dir}: was not written by the training worker; the run directory must be on "
            "storage that all nodes mount at the same path; the same command writes it again"
        )


def _fit(trainer: TorchTrainer, want: cluster.Want) -> list[worktime.Interval]:
    """``trainer.fit()``. Ray would wait for ever for a lost node; this gives up when the cluster
    stays too small.

    Returns:
        When rank 0 was at work.

    Raises:
        ClusterError: Nodes were lost and did not come back.
    """
    outcome = in_background(trainer.fit, "ray-train")
    enough = time.monotonic()
    while True:
        finished, _ = wait([outcome], timeout=LOST_SECONDS / 10)
        if finished:
            return outcome.result().return_value or []
        if cluster.room(want.cpus, want.gpus) >= want.count:
            enough = time.monotonic()
        elif time.monotonic() - enough > LOST_SECONDS:
            runlog.event("nodes_lost", runlog.ERROR)
            raise ClusterError(
                f"finetune.num_workers = {want.count}: nodes were lost and the cluster no longer "
                "holds the workers; nothing is lost, the same command goes on when they are back, "
                "or with a smaller --finetune.num_workers"
            )


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The user's error out of Ray's wrapping, as one line."""
    failures = list(getattr(error, "worker_failures", {}).values())
    failures.append(getattr(error, "controller_failure", error))
    found = [users_error(failure) for failure in failures]
    first = reason(failures[0], line=-1)
    return next(filter(None, found), None) or SapfError(f"fine-tuning failed: {first}")


class _LedgerProgress:
    """Reports steps as the ledger grows: one line a step, so no second channel from the workers is
    needed.
    """

    def __init__(
        self, ledger: Path, steps: int, *, callback: Callable[[int, int], None] | None
    ) -> None:
        self.ledger, self.steps, self.callback = ledger, steps, callback
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        offset, last = 0, 0
        while not self._stop.wait(0.5):
            with open(self.ledger, encoding="utf-8") as f:
                f.seek(offset)
                for line in iter(f.readline, ""):
                    if not line.endswith("\n"):
                        break
                    offset += len(line.encode())
                    if '"finetune/step/' in line:
                        last = int(line.split('"finetune/step/')[1].split('"')[0]) + 1
            assert self.callback is not None
            self.callback(last, self.steps)

    def __enter__(self) -> None:
        if self.callback:
            self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self.callback and exception[0] is None:
            self.callback(self.steps, self.steps)
