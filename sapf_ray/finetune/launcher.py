"""Fine-tuning as a Ray Train run: any number of workers, checkpoints, restarts by Ray."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sapf_ray import cluster
from sapf_ray.errors import BudgetError, SapfError
from sapf_ray.finetune.adapter import add_adapter, save_weights
from sapf_ray.finetune.loop import FinetuneJob, TrainState, train
from sapf_ray.models.loading import load_pipeline, pick_device

STATE_FILE = "state.pt"


def cpus_per_worker(job: FinetuneJob) -> float:
    """The configured cores, or an equal share of the cluster's."""
    total = ray.cluster_resources().get("CPU", 1.0)
    return job.config.cpus_per_worker or max(1.0, total // job.config.num_workers)


def _worker(parameters: dict) -> None:
    job: FinetuneJob = parameters["job"]
    torch.set_num_threads(max(1, int(parameters["cpus"])))
    job = replace(job, device=pick_device(job.config.gpus_per_worker))
    checkpoint = ray.train.get_checkpoint()
    resume = None
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            resume = TrainState.load(Path(directory) / STATE_FILE)

    def on_checkpoint(state: TrainState) -> None:
        metrics = {"step": state.step}
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            state.save(Path(directory) / STATE_FILE)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    train(job, resume, on_checkpoint)


def finetune(
    job: FinetuneJob, storage: Path, adapter_dir: Path, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Trains the adapter and writes it to ``adapter_dir``; continues from the last checkpoint in ``storage``.

    Raises:
        ClusterError: The cluster cannot hold the workers.
        BudgetError: A step would have passed the planned epsilon.
    """
    cluster.require(cluster.finetune_wants(job.config))
    cpus = cpus_per_worker(job)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "cpus": cpus},
        torch_config=TorchConfig(backend="nccl" if job.config.gpus_per_worker > 0 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.config.num_workers, use_gpu=job.config.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus}
            | ({"GPU": job.config.gpus_per_worker} if job.config.gpus_per_worker > 0 else {}),
        ),
        run_config=RunConfig(
            name="finetune", storage_path=str(storage.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=job.config.max_failures),
        ),
    )
    with _LedgerProgress(Path(job.ledger), job.config.steps, on_progress):
        try:
            result = _fit(trainer)
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as directory:
        state = TrainState.load(Path(directory) / STATE_FILE)
    pipe = load_pipeline(job.model.path, job.model.dtype)
    add_adapter(pipe.unet, job.matrices, job.config, job.seed)
    save_weights(pipe.unet, adapter_dir, state.average, job.config)


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    """``trainer.fit()`` on another thread: on the main one Ray takes SIGINT for itself and leaves with exit code 0.

    The main thread waits, so ctrl-C reaches the caller as KeyboardInterrupt in every stage alike.
    """
    outcome: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ray-train").start()
    return outcome.result()


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The user's error out of Ray's wrapping, as one line."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, SapfError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        if "BudgetError" in str(failure):
            return BudgetError(str(failure).strip().splitlines()[-1])
    first = next(iter(failures.values()), error)
    return SapfError(f"fine-tuning failed: {str(first).strip().splitlines()[-1]}")


class _LedgerProgress:
    """Reports steps as the ledger grows: one line a step, so no second channel from the workers is needed."""

    def __init__(self, ledger: Path, steps: int, callback: Callable[[int, int], None] | None) -> None:
        self.ledger, self.steps, self.callback = ledger, steps, callback
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        offset, last = 0, 0
        while not self._stop.wait(0.5):
            with open(self.ledger) as f:
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
