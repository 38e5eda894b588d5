"""What a grid found.

One row per cell, or per group of cells that differ in the seed only, with mean and deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapf_ray.evaluation.metrics import ACCURACY, headline
from sapf_ray.files import write_atomic
from sapf_ray.report.render import Column, Report
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.stages import Stage
from sapf_ray.tune.budget import WHO_PAYS, PlannedCell, is_finished, total_text, totals
from sapf_ray.tune.trial import Failure
from sapf_ray.tune.twin import ON_TWINS, is_on_twin

SEED = "seed"
SELECT = "select"
FINETUNE = "finetune"
SYNTHESIS = "synthesis"
# Stages of a run, by the three of the paper's Table 12. Private Evolution only synthesizes.
TABLE12_STAGES: Mapping[str, tuple[str, ...]] = {
    SELECT: (Stage.LATENTS, Stage.GROUNDING, Stage.SELECTION),
    FINETUNE: (Stage.FINETUNE,),
    SYNTHESIS: (Stage.SYNTHESIS, Stage.EVOLUTION),
}
_HEADERS = {
    "model": "public model",
    "dataset": "data set",
    "epsilon": "ε",
    "sigma_s": "σ_s",
}


def collect(
    planned: Sequence[PlannedCell],
    out: Path,
    *,
    failed: Mapping[str, Failure] | None = None,
) -> list[dict[str, Any]]:
    """One dict per cell: its labels, and ``status``: done, failed or missing.

    A finished run also has the scores (accuracy in %), ``epsilon_spent``, ``seconds`` per stage,
    ``peak_memory_mb`` per stage where it was measured (of the GPU where there is one), and
    ``matrices``.
    """
    failed = failed or {}
    rows = []
    for item in planned:
        name = item.cell.name
        row: dict[str, Any] = {**item.cell.labels, "cell": name, "status": "missing"}
        if name in failed:
            row["status"] = f"failed: {failed[name].kind}"
        elif is_finished(item.cell, out):
            row["status"] = "done"
            row.update(_results(RunDirectory(out / name)))
        rows.append(row)
    return rows


def _results(run: RunDirectory) -> dict[str, Any]:
    """What a finished run found."""
    metrics = run.read_json(run.metrics)
    results: dict[str, Any] = {}
    for name, metric in headline().items():
        if name in metrics:
            results[name] = metrics[name] * metric.scale
    results["epsilon_spent"] = float(metrics["epsilon_spent"])
    results["release"] = metrics.get("release")  # none in runs of earlier versions
    results["seconds"] = metrics["seconds"]
    memory = metrics.get("peak_gpu_memory_mb") or metrics.get("peak_memory_mb", {})
    results["peak_memory_mb"] = memory
    results["matrices"] = []
    if run.selection.exists():
        results["matrices"] = run.read_json(run.selection)["matrices"]
    return results


def over_seeds(rows: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Cells that differ in the seed only become one row.

    It has means, and ``*_sd``, the sample standard deviation (n - 1) of two or more; ``runs`` of
    ``cells`` are done.
    """
    keys = [axis for axis in axes if axis != SEED]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        labels = tuple(row[key] for key in keys)
        groups.setdefault(labels, []).append(row)
    merged = []
    for labels, cells in groups.items():
        named = dict(zip(keys, labels, strict=True))
        merged.append(_merged(named, cells))
    return merged


def _merged(labels: dict[str, Any], cells: list[Mapping[str, Any]]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "done"]
    other = [cell["status"] for cell in cells if cell["status"] != "done"]
    merged: dict[str, Any] = {**labels, "runs": len(done), "cells": len(cells)}
    merged["missing"] = "; ".join(dict.fromkeys(other)) or None
    scores = headline()
    for key in (*scores, "epsilon_spent"):
        values = np.array([cell[key] for cell in done if key in cell])
        if len(values):
            merged[key] = float(values.mean())
        if len(values) > 1 and key in scores:
            merged[f"{key}_sd"] = float(values.std(ddof=1))
    if done:
        seconds = [sum(cell["seconds"].values()) for cell in done]
        merged["release"] = "; ".join(
            dict.fromkeys(filter(None, (cell.get("release") for cell in done)))
        )
        merged["minutes"] = float(np.mean(seconds)) / 60
        merged["matrices"] = done[0]["matrices"]
        for stage, parts in TABLE12_STAGES.items():
            merged.update(_stage_costs(done, stage, parts=parts))
    return merged


def _stage_costs(
    cells: list[Mapping[str, Any]],
    stage: str,
    *,
    parts: tuple[str, ...],
) -> dict[str, float]:
    """Mean hours of a stage of Table 12, and its peak memory in GB where it was measured."""
    seconds = []
    peaks = []
    for cell in cells:
        seconds.append(sum(cell["seconds"].get(part, 0.0) for part in parts))
        memory = cell["peak_memory_mb"]
        if memory:
            peaks.append(max(memory.get(part, 0.0) for part in parts))
    costs = {f"{stage}_hours": float(np.mean(seconds)) / 3600}
    if peaks:
        costs[f"{stage}_gb"] = max(peaks) / 1024
    return costs


def axis_columns(axes: Iterable[str]) -> list[Column]:
    """The labels, as the first columns of a table."""
    columns = []
    for axis in axes:
        if axis != SEED:
            header = _HEADERS.get(axis, axis)
            columns.append(
                Column(
                    key=axis,
                    header=header,
                    format="g",
                )
            )
    return columns


def score_columns(rows: Iterable[Mapping[str, Any]], paper: bool = False) -> list[Column]:
    """Accuracy, and every other metric of the table that some run has.

    Args:
        rows: As :func:`over_seeds` makes them.
        paper: Beside our values those of the paper, with a column for each metric that it has.
    """
    rows = list(rows)
    columns = []
    for name, metric in headline().items():
        paper_key = metric.paper_key if paper else None
        if name == ACCURACY or paper_key or any(name in row for row in rows):
            column = Column(
                key=name,
                header=metric.short,
                format=metric.column_format,
                paper_key=paper_key,
                spread_key=f"{name}_sd",
            )
            columns.append(column)
    return columns


def privacy_notes(planned: Sequence[PlannedCell], out: Path) -> list[str]:
    """The totals per data set (design rule 7)."""
    sensitive = [item for item in planned if not is_on_twin(item.cell)]
    found = [total_text(total) for total in totals(sensitive, out)]
    if len(sensitive) < len(planned):
        return [*found, ON_TWINS]
    if not found:
        return ["No cell reads a sensitive image."]
    return [*found, WHO_PAYS]


def grid_report(
    name: str,
    title: str,
    *,
    planned: Sequence[PlannedCell],
    out: Path,
    failed: Mapping[str, Failure] | None = None,
    real: Mapping[str, Sequence[float]] | None = None,
) -> Report:
    """The grid's own table.

    Args:
        name: Name of the files of the table.
        title: Its caption; the name if empty.
        planned: The cells.
        out: Directory of their runs.
        failed: Cell name to why; the table shows the error's class alone.
        real: Row name to accuracies (in [0, 1], one per seed) of the classifier trained on real
            images.
    """
    axes = [axis for axis in planned[0].cell.labels if axis != SEED]
    rows = over_seeds(collect(planned, out, failed=failed), axes)
    for label, accuracies in (real or {}).items():
        rows.append({axes[0]: label, **_real_row(accuracies)})
    columns = [
        *axis_columns(axes),
        Column(key="runs", header="runs", format="d"),
        *score_columns(rows),
        Column(key="epsilon_spent", header="ε spent", format=".4g"),
        Column(key="minutes", header="minutes a run", format=".1f"),
    ]
    if any(row.get("release") for row in rows):
        columns.append(Column(key="release", header="release"))
    if any(row.get("missing") for row in rows):
        columns.append(Column(key="missing", header="not done"))
    return Report(
        name=name,
        caption=title or name,
        columns=tuple(columns),
        rows=rows,
        notes=tuple(privacy_notes(planned, out)),
    )


def _real_row(accuracies: Sequence[float]) -> dict[str, Any]:
    percent = 100 * np.array(accuracies)
    spread = float(percent.std(ddof=1)) if len(percent) > 1 else None
    return {
        "runs": len(percent),
        "accuracy": float(percent.mean()),
        "accuracy_sd": spread,
    }


def write_report(report: Report, out: Path) -> list[Path]:
    """The table as CSV, Markdown and LaTeX in ``out``."""
    paths = []
    for form, suffix in (("csv", "csv"), ("markdown", "md"), ("latex", "tex")):
        path = out / f"{report.name}.{suffix}"
        write_atomic(path, report.render(form))
        paths.append(path)
    return paths
