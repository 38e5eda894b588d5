"""Runs the cells of a grid as Ray Tune trials.

Each trial is one `sapf run` with everything nested inside it. A trial holds no CPU and no GPU: its
run's tasks, workers and actors take theirs stage by stage and hold one kind at a time, so trials
cannot block each other however many run at once. Tune puts a trial into a placement group that its
tasks would inherit and could never leave; the run therefore starts in a task outside of it.

A finished cell's run directory is kept and its cell left out of the next start, so the same command
continues a grid; a cell that was interrupted continues from its own run directory. Nothing of
Tune's own state is needed for that, and none is kept.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from sapf_ray import cluster, placement
from sapf_ray.config import RunConfig, config_hash, to_dict
from sapf_ray.data.base import open_source
from sapf_ray.errors import SapfError, reason
from sapf_ray.models.feature_table import record_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.runs.background import in_background
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.shared import private_folder
from sapf_ray.tune.budget import PlannedCell, is_finished, selection_root
from sapf_ray.tune.trial import CellJob, Failure, run_cell, trial

RETRIES = 2  # of a cell whose run broke off; an error of the user's is not tried again

_TUNE_DIRECTORY = ".tune"
_LATENTS = ".latents"
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a header even when it is to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of the cells.

    Attributes:
        failed: Cell name to why.
        kept_private: Sensitive folders that stay for the cells that are not finished.
    """

    failed: Mapping[str, Failure]
    kept_private: list[Path]


def concurrency(configs: Sequence[RunConfig]) -> int:
    """How many of the largest cell the cluster holds at once.

    CPUs or GPUs decide, whichever is short.
    """
    available = ray.cluster_resources()
    fits = []
    for config in configs:
        for want in cluster.wants(config):
            for kind, each in (("CPU", want.cpus), ("GPU", want.gpus)):
                requested = want.count * each
                if requested > 0:
                    fits.append(int(available.get(kind, 0.0) // requested))
    return max(1, min(fits, default=1))


def _for_cluster(config: RunConfig, at_once: int) -> RunConfig:
    """A cell's equal part of the cluster for each worker, where the config leaves it open."""
    finetune = config.finetune
    if at_once == 1 or finetune.steps == 0:
        return config
    cpus = cluster.worker_cpus(finetune, at_once)
    return replace(config, finetune=replace(finetune, cpus_per_worker=cpus))


def _placed(planned: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The cells with numbers for every ``auto``; each model is opened once."""
    models = {config_hash(item.cell.config, "model"): item.cell.config.model for item in planned}
    sampling_gb = {name: PublicModel.open(model).sampling_gb for name, model in models.items()}
    gpus = placement.cluster_gpus()
    placed = []
    for item in planned:
        model_gb = sampling_gb[config_hash(item.cell.config, "model")]
        config = placement.placed(item.cell.config, gpus, model_gb=model_gb)
        placed.append(replace(item, cell=replace(item.cell, config=config)))
    return placed


def check_resources(cells: Sequence[PlannedCell]) -> None:
    """Every cell alone must fit on the cluster.

    Raises:
        SapfError: One does not; names it and the field.
    """
    for item in cells:
        try:
            cluster.check(item.cell.config)
        except SapfError as error:
            raise SapfError(f"cell {item.cell.name}: {error}") from error


def run_cells(
    planned: Sequence[PlannedCell],
    out: Path,
    *,
    say: Say,
    max_concurrent: int | None = None,
    retries: int = RETRIES,
    tracking: Mapping[str, Any] | None = None,
    task: Any = run_cell,
) -> Outcome:
    """Runs every cell that is not finished; Ray must be up.

    Args:
        planned: From :func:`sapf_ray.tune.budget.plan_cells`.
        out: Directory of the run directories.
        say: Called with one line per event.
        max_concurrent: Number of cells at once; by default as many as the cluster holds.
        retries: Number of retries of a cell whose run was interrupted.
        tracking: Values of TrackingConfig for all cells: store, experiment, parent run.
        task: The Ray task that makes one run.

    Raises:
        SapfError: A cell requests more than the cluster has; nothing has started then.
    """
    todo = [item for item in planned if not is_finished(item.cell, out)]
    say(f"{len(planned)} cells, {len(planned) - len(todo)} of them finished before")
    private = _Private(planned, out)
    failed: Mapping[str, Failure] = {}
    try:
        if todo:
            todo = _placed(todo)
            check_resources(todo)
            at_once = max_concurrent or concurrency([item.cell.config for item in todo])
            say(f"up to {min(at_once, len(todo))} at a time")
            jobs = {}
            for item in todo:
                jobs[item.cell.name] = _job(
                    item,
                    out,
                    at_once=at_once,
                    latents=private.latents,
                    tracking=tracking or {},
                )
            failed = _tune(
                jobs,
                out,
                say=say,
                at_once=at_once,
                retries=retries,
                after=private.clean,
                task=task,
            )
    finally:
        kept = private.clean()
    return Outcome(failed, kept)


def _job(
    item: PlannedCell,
    out: Path,
    *,
    at_once: int,
    latents: Path,
    tracking: Mapping[str, Any],
) -> CellJob:
    config = _for_cluster(item.cell.config, at_once)
    shared = replace(
        config.cluster,
        latents_dir=config.cluster.latents_dir or str(latents),
        selection_dir=str(selection_root(config, out)),
    )
    config = replace(
        config,
        tracking=replace(config.tracking, **tracking),
        cluster=shared,
    )
    directory = (out / item.cell.name).resolve()
    return CellJob(to_dict(config), str(directory))


class _Private:
    """The sensitive folders that cells share: latents, and a selection's fingerprint.

    Each goes with its last cell.
    """

    def __init__(self, planned: Sequence[PlannedCell], out: Path) -> None:
        self.latents = (out / _LATENTS).resolve()
        self.out = out
        self.users: dict[Path, list[PlannedCell]] = {}
        for item in planned:
            for folder in self._folders(item):
                self.users.setdefault(folder, []).append(item)

    def clean(self) -> list[Path]:
        """Deletes what only finished cells used; returns what stays."""
        for folder, users in self.users.items():
            if folder.exists() and all(is_finished(item.cell, self.out) for item in users):
                shutil.rmtree(folder)
        kept = [folder for folder in self.users if folder.exists()]
        if self.latents.exists() and not any(self.latents.iterdir()):
            self.latents.rmdir()
        return kept

    def _folders(self, item: PlannedCell) -> Iterator[Path]:
        config = item.cell.config
        if item.plan.selection is not None and config.cluster.selection_dir is None:
            root = selection_root(config, self.out)
            yield private_folder(root, config, plan=item.plan)
        keeps_latents = config.cluster.keep_cache or config.cluster.latents_dir is not None
        if item.plan.encodes and not keeps_latents:
            source = open_source(config.data)
            model = PublicModel.open(config.model)
            features = record_features(config, item.plan)
            kept = None if features is None else features.key
            yield self.latents / model.latents_key(source.fingerprint(), source.prompts, kept)


def _tune(
    jobs: Mapping[str, CellJob],
    out: Path,
    *,
    say: Say,
    at_once: int,
    retries: int,
    after: Callable[[], object],
    task: Any,
) -> dict[str, Failure]:
    """The trials.

    Args:
        jobs: Cell name to job.
        out: Directory of the run directories.
        say: Called with one line per event.
        at_once: Number of cells at once.
        retries: Number of retries of a cell whose run was interrupted.
        after: Called after each cell.
        task: The Ray task that makes one run.

    Returns:
        The cells that failed for good, and why.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import tune

    from sapf_ray.tune.progress import GridProgress

    # what fails is reported in one line each
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    storage = (out / _TUNE_DIRECTORY).resolve()
    shutil.rmtree(storage, ignore_errors=True)
    trainable = tune.with_parameters(trial, jobs=dict(jobs), task=task)
    # no CPU, but Tune wants some resource: a byte of memory
    trainable = tune.with_resources(trainable, {"CPU": 0, "memory": 1})
    directories = {name: Path(job.out) for name, job in jobs.items()}
    tuner = tune.Tuner(
        trainable,
        param_space={"cell": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            trial_dirname_creator=_trial_folder,  # Tune's own counts characters, not bytes
        ),
        run_config=tune.RunConfig(
            name="grid",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[GridProgress(directories, say, after=after)],
        ),
    )
    try:
        results = in_background(tuner.fit, "ray-tune").result()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    failed = {}
    for result in results:
        problem = _problem(result)
        if problem is not None:
            name = result.config["cell"] if result.config else "?"
            failed[name] = problem
    return failed


def _trial_folder(trial: Any) -> str:
    return str(trial.trial_id)


def _problem(result: Any) -> Failure | None:
    """Why a trial failed; None if it did not."""
    if result.error is not None:
        return Failure(kind=type(result.error).__name__, message=one_line(result.error))
    metrics = result.metrics or {}
    if "error" not in metrics:
        return None
    return Failure(kind=metrics["error_kind"], message=metrics["error"])


def one_line(error: BaseException) -> str:
    """The last line of an error's text: a Ray error is a traceback that ends in what happened."""
    return reason(error, line=-1).removeprefix("sapf_ray.errors.").strip()


def unfinished_runs(planned: Sequence[PlannedCell], out: Path) -> list[RunDirectory]:
    """Run directories of cells that began and are not finished."""
    unfinished = [item for item in planned if not is_finished(item.cell, out)]
    runs = [RunDirectory(out / item.cell.name) for item in unfinished]
    return [run for run in runs if run.config.exists()]
