"""What a grid found: one row per cell, or per group of cells that differ in the seed only, with
mean and deviation.
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
from sapf_ray.tune.budget import WHO_PAYS, PlannedCell, is_finished, total_text, totals

SEED = "seed"
SELECT, FINETUNE, SYNTHESIS = "select", "finetune", "synthesis"
# Stages of a run, by the three of the paper's Table 12. Private Evolution only synthesizes.
STAGES: Mapping[str, tuple[str, ...]] = {
    SELECT: ("latents", "selection"),
    FINETUNE: ("finetune",),
    SYNTHESIS: ("synthesis", "evolution"),
}
_HEADERS = {"model": "public model", "dataset": "data set", "epsilon": "ε", "sigma_s": "σ_s"}


def collect(
    planned: Sequence[PlannedCell], out: Path, *, failed: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One dict per cell: its labels, and ``status``: done, failed or missing.

    Of a finished run also the scores (accuracy in %), ``epsilon_spent``, ``seconds`` per stage,
    ``peak_memory_mb`` per stage where it was measured (of the GPU where there is one), and
    ``matrices``.
    """
    rows = []
    for item in planned:
        row: dict[str, Any] = {**item.cell.labels, "cell": item.cell.name, "status": "missing"}
        if item.cell.name in (failed or {}):
            row["status"] = f"failed: {(failed or {})[item.cell.name]}"
        elif is_finished(item.cell, out):
            run = RunDirectory(out / item.cell.name)
            metrics = run.read_json(run.metrics)
            row["status"] = "done"
            row.update(
                {
                    name: metrics[name] * metric.scale
                    for name, metric in headline().items()
                    if name in metrics
                }
            )
            row["epsilon_spent"] = float(metrics["epsilon_spent"])
            row["seconds"] = metrics["seconds"]
            row["peak_memory_mb"] = metrics.get("peak_gpu_memory_mb") or metrics.get(
                "peak_memory_mb", {}
            )
            row["matrices"] = (
                run.read_json(run.selection)["matrices"] if run.selection.exists() else []
            )
        rows.append(row)
    return rows


def over_seeds(rows: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Cells that differ in the seed only become one row: means, and ``*_sd``, the sample standard
    deviation (n - 1) of two or more; ``runs`` of ``cells`` are done."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    keys = [axis for axis in axes if axis != SEED]
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        _merged(dict(zip(keys, labels, strict=True)), cells) for labels, cells in groups.items()
    ]


def _merged(labels: dict[str, Any], cells: list[Mapping[str, Any]]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "done"]
    merged: dict[str, Any] = {**labels, "runs": len(done), "cells": len(cells)}
    merged["missing"] = (
        "; ".join(dict.fromkeys(cell["status"] for cell in cells if cell["status"] != "done"))
        or None
    )
    scores = headline()
    for key in (*scores, "epsilon_spent"):
        values = np.array([cell[key] for cell in done if key in cell])
        if len(values):
            merged[key] = float(values.mean())
        if len(values) > 1 and key in scores:
            merged[f"{key}_sd"] = float(values.std(ddof=1))
    if done:
        merged["minutes"] = float(np.mean([sum(cell["seconds"].values()) for cell in done])) / 60
        merged["matrices"] = done[0]["matrices"]
        for stage, parts in STAGES.items():
            merged[f"{stage}_hours"] = (
                float(np.mean([sum(c["seconds"].get(p, 0.0) for p in parts) for c in done])) / 3600
            )
            peaks = [
                max((c["peak_memory_mb"].get(p, 0.0) for p in parts), default=0.0)
                for c in done
                if c["peak_memory_mb"]
            ]
            if peaks:
                merged[f"{stage}_gb"] = max(peaks) / 1024
    return merged


def axis_columns(axes: Iterable[str]) -> list[Column]:
    """The labels, as the first columns of a table."""
    return [
        Column(key=axis, header=_HEADERS.get(axis, axis), format="g")
        for axis in axes
        if axis != SEED
    ]


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
    found = [total_text(total) for total in totals(planned, out)]
    return [*found, WHO_PAYS] if found else ["No cell reads a sensitive image."]


def grid_report(
    name: str,
    title: str,
    *,
    planned: Sequence[PlannedCell],
    out: Path,
    failed: Mapping[str, str] | None = None,
    real: Mapping[str, Sequence[float]] | None = None,
) -> Report:
    """The grid's own table.

    Args:
        real: Row name to accuracies (in [0, 1], one per seed) of the classifier trained on real
            images.
    """
    axes = [axis for axis in planned[0].cell.labels if axis != SEED]
    rows = over_seeds(collect(planned, out, failed=failed), axes)
    for label, accuracies in (real or {}).items():
        values = 100 * np.array(accuracies)
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        rows.append(
            {
                axes[0]: label,
                "runs": len(values),
                "accuracy": float(values.mean()),
                "accuracy_sd": sd,
            }
        )
    columns = [
        *axis_columns(axes),
        Column(key="runs", header="runs", format="d"),
        *score_columns(rows),
        Column(key="epsilon_spent", header="ε spent", format=".4g"),
        Column(key="minutes", header="minutes a run", format=".1f"),
    ]
    if any(row.get("missing") for row in rows):
        columns.append(Column(key="missing", header="not done"))
    return Report(
        name=name,
        caption=title or name,
        columns=tuple(columns),
        rows=rows,
        notes=tuple(privacy_notes(planned, out)),
    )


def write_report(report: Report, out: Path) -> list[Path]:
    """The table as CSV, Markdown and LaTeX in ``out``."""
    paths = []
    for form, suffix in (("csv", "csv"), ("markdown", "md"), ("latex", "tex")):
        path = out / f"{report.name}.{suffix}"
        write_atomic(path, report.render(form))
        paths.append(path)
    return paths
