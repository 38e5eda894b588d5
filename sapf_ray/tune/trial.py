"""One cell in Ray's processes.

Light to import: a trial only waits for the task that does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from sapf_ray import cluster
from sapf_ray.config import from_dict
from sapf_ray.errors import BudgetError, ConfigError, DataError
from sapf_ray.runs import runlog
from sapf_ray.runs.directory import RunDirectory

WATCH_SECONDS = 2.0
FINAL = (ConfigError, DataError, BudgetError)  # errors that no repetition heals


@dataclass(frozen=True)
class CellJob:
    """What a trial runs.

    Attributes:
        config: The cell's config, nested.
        out: Its run directory.
    """

    config: dict[str, Any]
    out: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no result.

    Attributes:
        kind: The error's class: all that tables, files and MLflow show.
        message: For the terminal alone, as it may name a user's files.
    """

    kind: str
    message: str


@ray.remote(num_cpus=0, max_retries=0)
def run_cell(config: dict[str, Any], out: str) -> Failure | None:
    """One run in a process of its own; returns the error that no repetition can heal, if any."""
    from sapf_ray.pipeline import run

    try:
        run(from_dict(config), out)
    except FINAL as error:
        return Failure(kind=type(error).__name__, message=str(error))
    return None


def trial(
    labels: dict[str, Any],
    jobs: Mapping[str, CellJob],
    *,
    task: Any,
) -> None:
    """Tune's function trainable: the cell ``labels["cell"]``. Reports each stage as it begins, and
    at the end the run's numbers, so that Tune's results, dashboard and loggers show them.

    Args:
        labels: Tune's parameters.
        jobs: Cell name to job.
        task: The Ray task that makes one run (:func:`run_cell`).
    """
    from ray import tune

    job = jobs[labels["cell"]]
    # "DEFAULT" is explicit: without it the task would be put into the trial's own placement group
    run = task.options(name="cell", scheduling_strategy="DEFAULT")
    reference = run.remote(job.config, job.out)
    directory = RunDirectory(job.out)
    stage = None
    ready: list[ray.ObjectRef] = []
    while not ready:
        ready, _ = ray.wait([reference], timeout=WATCH_SECONDS)
        begun = runlog.last_stage(directory.log)
        if begun != stage:
            stage = begun
            tune.report({"stage": stage})
    problem: Failure | None = cluster.result(reference)
    failure = {} if problem is None else {"error": problem.message, "error_kind": problem.kind}
    tune.report({"stage": "end", **failure, **numbers(directory)})


def numbers(directory: RunDirectory) -> dict[str, float]:
    """Scores, epsilon and delta of a run; none where it did not get to its end."""
    if not directory.metrics.exists():
        return {}
    found = directory.read_json(directory.metrics)
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
