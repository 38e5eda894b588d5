"""`sapf tune` from the file to the table: read, validate, plan, run, summarize.

All configuration errors of a cell are reported before the first one starts. The grid's summary and
each of its cells are MLflow runs side by side: MLflow's page would fold children away.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from sapf_ray import cluster
from sapf_ray.config import RunConfig, config_hash, flatten, from_dict, to_dict
from sapf_ray.errors import RunDirectoryError, SapfError
from sapf_ray.files import write_json
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.report.render import Report
from sapf_ray.runs import mlflow_page
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.tracking import Tracker, tracking_uri
from sapf_ray.tune.budget import PlannedCell, is_finished, plan_cells, totals
from sapf_ray.tune.resources import CellTime, cell_times, check_disk
from sapf_ray.tune.run import RETRIES, Outcome, run_cells, unfinished_runs
from sapf_ray.tune.space import Overrides, Space, load_space, make_cells
from sapf_ray.tune.summary import grid_report, privacy_notes, write_report
from sapf_ray.tune.twin import on_twins

REAL = "real training images (not private)"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A space with all its cells validated and planned.

    Attributes:
        space: The space file.
        planned: Its cells.
        out: Holds one run directory per cell, and the summary.
    """

    space: Space
    planned: list[PlannedCell]
    out: Path


def open_grid(
    name: str,
    out: str | None = None,
    *,
    smoke: bool = False,
    overrides: Overrides | None = None,
    only: Mapping[str, str] | None = None,
    strict: bool = False,
    make_twin: Callable[[RunConfig, str], object] | None = None,
) -> Grid:
    """Reads a space and plans its cells; reads no image and writes nothing.

    Args:
        name: Name of the space, or its path.
        out: Directory of the runs; ``runs/<space>`` unless given, with ``-twin`` where cells run
            on twins.
        smoke: Apply the space's smoke block.
        overrides: Dotted config keys.
        only: Axis to label: these cells only.
        strict: Data sets and models must be there.
        make_twin: Runs a config in a directory. Where it is given, the cells run on public twins
            of their images (:mod:`sapf_ray.tune.twin`), which it makes now.

    Raises:
        SapfError: One line that names the file, or the cell and the field.
    """
    space = load_space(name, smoke)
    usual = f"runs/{space.name}" if make_twin is None else f"runs/{space.name}-twin"
    directory = Path(out or usual).expanduser()
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"--out {directory}: is a file, must be a directory")
    if RunDirectory(directory).config.exists():
        raise RunDirectoryError(
            f"--out {directory}: is the directory of a single run; use another one"
        )
    cells = make_cells(space, overrides, only=only)
    if make_twin is not None:
        cells = on_twins(cells, directory, make_twin)
    planned = plan_cells(cells, strict=strict)
    for item in planned:
        is_finished(item.cell, directory)  # raises where another config's run is there
    return Grid(
        space=space,
        planned=planned,
        out=directory,
    )


def dry_run_table(grid: Grid) -> Table:
    """Every cell with its method, budget, noise and time; below, what all of them cost together."""
    times = cell_times(grid.planned, grid.out)
    todo = [item for item in grid.planned if not is_finished(item.cell, grid.out)]
    title = grid.space.title or grid.space.name
    table = Table(title=f"{title}: {len(grid.planned)} cells, {len(todo)} to run")
    for header in ("cell", "method"):
        table.add_column(header, overflow="fold")
    for header in ("ε", "σ_s", "σ", "minutes"):
        table.add_column(header, justify="right")
    table.add_column("time is")
    for item in grid.planned:
        table.add_row(*_dry_run_row(item, times[item.cell.name]))
    seconds = sum(times[item.cell.name].seconds for item in todo)
    caption = [
        *privacy_notes(grid.planned, grid.out),
        f"About {_duration(seconds)} for what is left, one cell after another; `guess` is from "
        "rates of another machine (two CPU cores for the bundled models, the paper's Table 12 for "
        "others), so right to an order of magnitude.",
    ]
    table.caption = "\n".join(caption)
    table.caption_justify = "left"
    return table


def _dry_run_row(item: PlannedCell, time: CellTime) -> list[str]:
    plan = item.plan
    trained = plan.finetune or plan.evolution
    return [
        item.cell.name,
        item.cell.method or "-",
        _epsilon(plan),
        f"{plan.selection.noise_multiplier:.4g}" if plan.selection else "-",
        f"{trained.noise_multiplier:.4g}" if trained else "-",
        f"{time.seconds / 60:.1f}",
        time.source,
    ]


def _epsilon(plan: PrivacyPlan) -> str:
    if not plan.reads_images:
        return "0"
    if plan.non_private:
        return "∞, no noise"
    return f"{plan.epsilon:g}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes"


def run_grid(
    grid: Grid,
    console: Console,
    *,
    max_concurrent: int | None = None,
    retries: int = RETRIES,
) -> tuple[Report, Outcome]:
    """Runs what is not finished and writes the summary; the same call continues a grid.

    Args:
        grid: The cells.
        console: Where events are reported.
        max_concurrent: Number of cells at once; by default as many as the cluster holds.
        retries: Number of retries of a cell whose run was interrupted.

    Raises:
        SapfError: Nothing has started: a cell requests more than the cluster has, MLflow is not
            reachable, and the like.
    """
    todo = [item for item in grid.planned if not is_finished(item.cell, grid.out)]
    warning = check_disk(todo, grid.out)
    if warning:
        console.print(warning, style="yellow")
    grid.out.mkdir(parents=True, exist_ok=True)
    first = grid.planned[0].cell.config
    tracker, tracking = _parent(grid, first)
    for note in privacy_notes(grid.planned, grid.out):
        console.print(note, style="dim")
    # Ray warns of many processes from four times this on; a waiting trial is a process, too
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    uses_ray = todo or grid.space.real_data
    try:
        spills = grid.out / "spilled"
        with cluster.session(first.cluster, spills=spills) if uses_ray else nullcontext():
            outcome = run_cells(
                grid.planned,
                grid.out,
                say=console.print,
                max_concurrent=max_concurrent,
                retries=retries,
                tracking=tracking,
            )
            real = _real_data(grid) if grid.space.real_data else {}
        report = grid_report(
            grid.space.name,
            grid.space.title,
            planned=grid.planned,
            out=grid.out,
            failed=outcome.failed,
            real=real,
        )
        files = write_report(report, grid.out)
        try:
            _finish(tracker, grid, outcome=outcome, files=files, report=report)
        except Exception as error:  # mlflow, requests and sqlalchemy raise their own families
            console.print(
                f"MLflow at {tracker.uri} lacks the grid's summary ({type(error).__name__}); "
                "the same command logs it"
            )
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        _close_children(tracker, grid, status=status)
        tracker.fail(status)
        raise
    for folder in outcome.kept_private:
        note = f"{folder}: sensitive files stay for the cells that are not finished"
        console.print(note, style="yellow")
    return report, outcome


def raise_failures(outcome: Outcome) -> None:
    """One error for all cells that failed.

    Raises:
        SapfError: Some cells failed; names the first one.
    """
    if not outcome.failed:
        return
    n = len(outcome.failed)
    name, problem = next(iter(outcome.failed.items()))
    more = f", and {n - 1} more" if n > 1 else ""
    raise SapfError(
        f"{n} cells failed: {name}: {problem.message}{more}; the same command tries them again"
    )


def _parent(grid: Grid, config: RunConfig) -> tuple[Tracker, dict[str, Any]]:
    """The grid's MLflow run, and what the cells' configs need to stand beside it."""
    if not config.tracking.enabled:
        return Tracker(None, None), {}
    experiment = config.tracking.experiment
    if experiment == type(config.tracking)().experiment:
        experiment = grid.space.name
    nested = to_dict(config)
    nested["tracking"]["experiment"] = experiment
    directory = RunDirectory(grid.out)
    begun = any(RunDirectory(grid.out / item.cell.name).ledger.exists() for item in grid.planned)
    tracker = Tracker.open(from_dict(nested), directory, params=_parameters(grid), begun=begun)
    children = {
        "uri": tracking_uri(config, directory),
        "experiment": experiment,
        # known to a cell even where the store was lost: its own store's trouble is no error either
        "parent_run_id": tracker.run_id or grid.space.name,
    }
    return tracker, children


def _parameters(grid: Grid) -> dict[str, Any]:
    """What the grid's MLflow run shows: values that all cells share, and the axes."""
    first, *others = [flatten(to_dict(item.cell.config)) for item in grid.planned]
    parameters = {}
    for key, value in first.items():
        if all(other[key] == value for other in others):
            parameters[key] = value
    for axis, labels in grid.space.axes.items():
        text = ", ".join(map(str, labels))
        parameters[f"axis.{axis}"] = text[:500]
    return parameters


def _finish(
    tracker: Tracker,
    grid: Grid,
    *,
    outcome: Outcome,
    files: Sequence[Path],
    report: Report,
) -> None:
    client = tracker.client
    if client is None:
        return
    finished = sum(is_finished(item.cell, grid.out) for item in grid.planned)
    # tags, for each metric is a chart of the page that compares the cells
    values: dict[str, object] = {
        "grid.cells": len(grid.planned),
        "grid.finished": finished,
        "grid.failed": len(outcome.failed),
    }
    for total in totals(grid.planned, grid.out):
        source = total.data.split()[0]
        values[f"grid.total_epsilon.{source}"] = f"{total.epsilon:.6g}"
    for key, value in values.items():
        client.set_tag(tracker.run_id, key, value)
    experiment = client.get_run(tracker.run_id).info.experiment_id
    client.set_experiment_tag(experiment, mlflow_page.NOTE, report.render("markdown"))
    for path in files:
        client.log_artifact(tracker.run_id, str(path))
    status = "FINISHED"
    if outcome.failed:
        status = "FAILED"
        _close_children(tracker, grid, status=status)
    client.set_terminated(tracker.run_id, status=status)


def _close_children(
    tracker: Tracker,
    grid: Grid,
    *,
    status: str,
) -> None:
    """Runs that were ended with their process could not close their MLflow run themselves."""
    if tracker.client is None:
        return
    for run in unfinished_runs(grid.planned, grid.out):
        if not run.mlflow.exists():
            continue
        with suppress(Exception):  # the grid's own error is the one to show
            run_id = run.read_json(run.mlflow)["run_id"]
            tracker.client.set_terminated(run_id, status=status)


@ray.remote(num_cpus=1, max_retries=1)
def _real_data_accuracy(config: RunConfig) -> float:
    from sapf_ray.data.base import SPLITS, open_source
    from sapf_ray.evaluation.downstream import mean_accuracy
    from sapf_ray.evaluation.pictures import source_parts, store
    from sapf_ray.models.public_model import PublicModel

    source = open_source(config.data)
    made = config.synthesis.side(PublicModel.open(config.model).resolution)
    resolution = config.evaluation.compared_at(source.resolution, made)
    with tempfile.TemporaryDirectory(prefix="sapf-evaluation-") as folder:
        train, test = (
            store(
                Path(folder) / split,
                partial(source_parts, source, split, side=resolution),
                side=resolution,
            )
            for split in SPLITS
        )
        return mean_accuracy(
            train,
            test,
            data=source.name,
            n_classes=len(source.class_names),
            config=config.evaluation,
            seed=config.seed,
        )


def _real_data(grid: Grid) -> dict[str, list[float]]:
    """Accuracies of the classifier trained on the real training images, one per seed.

    They are kept in ``real_data.json``.
    """
    path = grid.out / "real_data.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = {_real_key(item.cell.config): item.cell.config for item in grid.planned}
    pending = {}
    for key, config in wanted.items():
        if key not in known:
            pending[key] = _real_data_accuracy.remote(config)
    for key, reference in pending.items():
        known[key] = cluster.result(reference)
    write_json(path, known)
    sources = {config.data.source for config in wanted.values()}
    named: dict[str, list[float]] = {}
    for key, config in wanted.items():
        label = REAL if len(sources) == 1 else f"{REAL}, {config.data.source}"
        named.setdefault(label, []).append(known[key])
    return named


def _real_key(config: RunConfig) -> str:
    settings = config_hash(config, "data", "model", "evaluation")
    made = "" if config.synthesis.resolution is None else f"-{config.synthesis.resolution}px"
    return f"{config.data.source}-seed{config.seed}-{settings}{made}"
