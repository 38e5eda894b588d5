"""One cell in Ray's processes. Light to import: a trial only waits for the task that does the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from sapf_ray import cluster
from sapf_ray.config import from_dict
from sapf_ray.errors import BudgetError, ConfigError, DataError

FINAL = (ConfigError, DataError, BudgetError)  # errors that no repetition heals
Job = tuple[dict[str, Any], str]  # nested config, run directory


@ray.remote(num_cpus=0, max_retries=0)
def run_cell(config: dict[str, Any], out: str) -> str | None:
    """One run in a process of its own; returns the error that no repetition can heal, if any."""
    from sapf_ray.pipeline import run

    try:
        run(from_dict(config), out)
    except FINAL as error:
        return str(error)
    return None


def trial(labels: dict[str, Any], jobs: Mapping[str, Job], task: Any) -> None:
    """Tune's function trainable: the cell ``labels["cell"]`` of ``jobs``, by ``task``
    (:func:`run_cell`).
    """
    from ray import tune

    # "DEFAULT" is explicit: without it the task would be put into the trial's own placement group
    run = task.options(name="cell", scheduling_strategy="DEFAULT")
    tune.report({"error": cluster.result(run.remote(*jobs[labels["cell"]]))})
