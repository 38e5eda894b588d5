"""The paper's tables and figures that need runs: our grid's numbers beside the printed ones.

Each has a space of the same name in ``tune_spaces/``, whose labels are the paper's. Where the space
names other labels (a smoke twin: other model, other images) its ``beside`` says which of the
paper's rows to print; those pairs are no comparison, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray.errors import ConfigError
from sapf_ray.paper.accounting_reports import TABLES
from sapf_ray.paper.figures import save_bars, save_lines
from sapf_ray.paper.matrices import block_rows, save_matrix_map
from sapf_ray.paper.tables import paper_table
from sapf_ray.report.render import Column, Report
from sapf_ray.tune.grid import Grid
from sapf_ray.tune.space import Space
from sapf_ray.tune.summary import (
    TABLE12_STAGES,
    axis_columns,
    collect,
    over_seeds,
    privacy_notes,
    score_columns,
    write_report,
)
from sapf_ray.tune.trial import Failure


@dataclass(frozen=True, kw_only=True)
class ExtraColumn:
    """A pair of columns beside the scores.

    Attributes:
        key: Key of our value.
        header: Header of the column.
        format: Format of the values.
        paper: The paper's column.
    """

    key: str
    header: str
    format: str
    paper: str


@dataclass(frozen=True, kw_only=True)
class PaperGrid:
    """How a table's columns correspond to a grid's axes.

    Attributes:
        axes: Axis to the paper's column; an axis without a column is constant in the paper's table.
        plot: bars (over the last axis named) or lines (over it, one line per value of ``by``); None
            for tables.
        by: Axis whose values have a line each.
        extra: More pairs of columns.
    """

    axes: Mapping[str, str]
    plot: str | None = None
    by: str | None = None
    extra: tuple[ExtraColumn, ...] = ()


_MODEL_DATA = {"model": "public_model", "dataset": "dataset"}
PAPER_GRIDS: Mapping[str, PaperGrid] = {
    "table2": PaperGrid(axes={"method": "method"}),
    "table5": PaperGrid(axes={**_MODEL_DATA, "method": "method", "epsilon": "epsilon"}),
    "table6": PaperGrid(axes={"dataset": "dataset", "method": "method"}),
    "table7": PaperGrid(axes={"ratio": "ratio_percent"}),
    "table8": PaperGrid(axes={**_MODEL_DATA, "epsilon": "epsilon"}),
    "table11": PaperGrid(axes={**_MODEL_DATA, "method": "finetuning"}),
    "table12": PaperGrid(axes={"method": "method"}),
    "table15": PaperGrid(
        axes={"dataset": "dataset", "method": "metric"},
        extra=(
            ExtraColumn(key="select_hours", header="selection hours", format=".4f", paper="hours"),
        ),
    ),
    "figure4": PaperGrid(axes={**_MODEL_DATA, "method": "method"}, plot="bars"),
    "figure5": PaperGrid(
        axes={**_MODEL_DATA, "epsilon": "epsilon", "ratio": "ratio"},
        plot="lines",
        by="epsilon",
    ),
    "figure6": PaperGrid(axes={**_MODEL_DATA, "method": "method"}, plot="bars"),
    "figure7": PaperGrid(
        axes={**_MODEL_DATA, "ratio": "ratio"},
        plot="lines",
        by="model",
    ),
}
# of the paper's main results (Table 13), so their points in the figures over the ratio
_FIGURES_RATIO = 0.3
# Points of figures that the text gives (sections 5.2 and 5.3); the figures themselves print no
# numbers.
_IN_TEXT: Mapping[str, list[dict[str, Any]]] = {
    "figure4": [
        {
            "public_model": "SD-v1-5",
            "dataset": "cifar10",
            "method": "Random",
            "fid": 146.3,
            "acc": 16.2,
        },
        {
            "public_model": "SD-v1-5",
            "dataset": "celeba",
            "method": "Layer-Level",
            "fid": 121.6,
            "acc": 64.0,
        },
    ],
    "figure5": [
        {
            "public_model": "SD-v1-5",
            "dataset": "cifar10",
            "epsilon": 20.0,
            "ratio": _FIGURES_RATIO,
            "fid": 25.5,
            "acc": None,
        },
    ],
}
NOT_COMPARABLE = (
    "The paper's numbers beside ours belong to {pairs}: another model and other images, so the "
    "pairs show which row is which and are no comparison."
)


def names() -> list[str]:
    """Names that ``sapf reproduce`` takes: tables first, each kind by number."""

    def order(name: str) -> tuple[bool, int]:
        number = re.sub(r"\D", "", name)
        return name.startswith("figure"), int(number)

    return sorted({*TABLES, *PAPER_GRIDS}, key=order)


def check_name(name: str) -> None:
    """Refuses what cannot be reproduced.

    Raises:
        ConfigError: Nothing of the paper that can be reproduced has this name.
    """
    if name not in TABLES and name not in PAPER_GRIDS:
        raise ConfigError("table", name, f"must be one of {', '.join(names())}")


def paper_rows(name: str) -> list[dict[str, Any]]:
    """The printed rows; for a figure the points that Table 5 or the text gives."""
    if not name.startswith("figure"):
        return paper_table(name)
    rows = []
    for row in paper_table("table5"):
        if row["method"] not in ("DP-SAPF", "DP-LoRA"):
            continue
        if name in ("figure4", "figure6", "figure7") and row["epsilon"] != 10:
            continue
        if name in ("figure5", "figure7"):
            ratio = _FIGURES_RATIO if row["method"] == "DP-SAPF" else 1.0
            row = row | {"ratio": ratio}
        rows.append(row)
    return [*rows, *_IN_TEXT.get(name, [])]


def paper_report(
    name: str,
    grid: Grid,
    *,
    failed: Mapping[str, Failure] | None = None,
) -> Report:
    """The paper's table with our numbers beside it.

    It is written to the grid's directory as CSV, Markdown and LaTeX.
    """
    axes = [axis for axis in grid.planned[0].cell.labels if axis != "seed"]
    ours = over_seeds(collect(grid.planned, grid.out, failed=failed), axes)
    make = {"table7": _matrices, "table12": _resources}.get(name, _scores)
    columns, rows = make(name, axes, ours=ours, space=grid.space)
    notes = privacy_notes(grid.planned, grid.out)
    pairs = _pairs(grid.space, ours)
    if pairs and grid.space.name.endswith("-smoke"):
        notes.insert(0, NOT_COMPARABLE.format(pairs=", ".join(pairs)))
    if any("fid" not in row for row in ours):
        notes.append(
            "FID is Inception's and needs --evaluation.inception_weights; without them its cells "
            "stay empty."
        )
    if any(row.get("missing") for row in rows):
        columns = [*columns, Column(key="missing", header="not done")]
    report = Report(
        name=name,
        caption=grid.space.title,
        columns=tuple(columns),
        rows=rows,
        notes=tuple(notes),
    )
    write_report(report, grid.out)
    return report


def _pairs(space: Space, ours: list[dict[str, Any]]) -> list[str]:
    """The paper's labels that stand beside other labels of ours."""
    pairs = []
    for labels in space.beside.values():
        for own, paper in labels.items():
            if any(own in row.values() for row in ours):
                pairs.append(f"{paper} (beside {own})")
    return pairs


def _paper_key(
    name: str,
    row: Mapping[str, Any],
    *,
    space: Space,
) -> tuple[Any, ...]:
    """Key of the paper's row that stands beside ours: the labels of the mapped axes."""
    key = []
    for axis in PAPER_GRIDS[name].axes:
        label = row[axis]
        paper_label = space.beside.get(axis, {}).get(label, label)
        key.append(paper_label)
    return tuple(key)


def _printed(name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The paper's rows by key."""
    columns = PAPER_GRIDS[name].axes.values()
    printed = {}
    for row in paper_rows(name):
        key = tuple(row.get(column) for column in columns)
        printed[key] = row
    return printed


def _scores(
    name: str,
    axes: Sequence[str],
    *,
    ours: list[dict[str, Any]],
    space: Space,
) -> tuple[list[Column], list[dict[str, Any]]]:
    spec = PAPER_GRIDS[name]
    printed = _printed(name)
    paper_columns = ["fid", "acc", *[column.paper for column in spec.extra]]

    def of_paper(row: Mapping[str, Any]) -> dict[str, Any]:
        return {f"paper_{column}": row.get(column) for column in paper_columns}

    rows = []
    used = set()
    for row in ours:
        key = _paper_key(name, row, space=space)
        used.add(key)
        rows.append(row | of_paper(printed.get(key, {})))
    if not space.name.endswith("-smoke") and not name.startswith("figure"):
        constant = {axis: row[axis] for row in ours[:1] for axis in axes if axis not in spec.axes}
        for key, paper in printed.items():
            if key not in used:
                labels = dict(zip(spec.axes, key, strict=True))
                rows.append({**constant, **labels, "missing": "not in the grid", **of_paper(paper)})
    columns = [*axis_columns(axes), *score_columns(rows, paper=True)]
    for extra in spec.extra:
        column = Column(
            key=extra.key,
            header=extra.header,
            format=extra.format,
            paper_key=f"paper_{extra.paper}",
        )
        columns.append(column)
    columns.append(
        Column(
            key="epsilon_spent",
            header="ε spent",
            format=".4g",
        )
    )
    return columns, rows


def _resources(
    name: str,
    axes: Sequence[str],
    *,
    ours: list[dict[str, Any]],
    space: Space,
) -> tuple[list[Column], list[dict[str, Any]]]:
    printed = {(row["method"], row["stage"]): row for row in paper_rows(name)}
    rows = []
    for row in ours:
        (method,) = _paper_key(name, row, space=space)
        for stage in TABLE12_STAGES:
            paper = printed.get((method, stage), {})
            rows.append(
                {
                    **{axis: row[axis] for axis in axes},
                    "stage": stage,
                    "hours": row.get(f"{stage}_hours"),
                    "gb": row.get(f"{stage}_gb"),
                    "paper_hours": paper.get("hours"),
                    "paper_gb": paper.get("memory_gb"),
                    "missing": row["missing"],
                }
            )
    columns = [
        *axis_columns(axes),
        Column(key="stage", header="stage"),
        Column(key="gb", header="memory GB", format=".2f", paper_key="paper_gb"),
        Column(key="hours", header="hours", format=".3f", paper_key="paper_hours"),
    ]
    return columns, rows


def _matrices(
    name: str,
    axes: Sequence[str],
    *,
    ours: list[dict[str, Any]],
    space: Space,
) -> tuple[list[Column], list[dict[str, Any]]]:
    printed = paper_rows(name)
    rows = []
    for row in ours:
        percent = round(100 * row["ratio"], 6)
        paper = {found["block"]: found for found in printed if found["ratio_percent"] == percent}
        kept = block_rows(row.get("matrices") or [])
        for block in dict.fromkeys([*kept, *paper]):
            mine = kept.get(block, {})
            theirs = paper.get(block, {})
            rows.append(
                {
                    **{axis: row[axis] for axis in axes},
                    "block": block,
                    "missing": row["missing"],
                    "attn1": mine.get("attn1"),
                    "attn2": mine.get("attn2"),
                    "paper_attn1": theirs.get("attn1"),
                    "paper_attn2": theirs.get("attn2"),
                }
            )
    columns = [
        *axis_columns(axes),
        Column(key="block", header="block"),
        Column(key="attn1", header="self-attention", paper_key="paper_attn1"),
        Column(key="attn2", header="cross-attention", paper_key="paper_attn2"),
    ]
    return columns, rows


def write_plots(
    name: str,
    report: Report,
    *,
    grid: Grid,
) -> list[Path]:
    """The figure, where the paper has one; for Table 7 a heat map. Returns what was written."""
    spec = PAPER_GRIDS[name]
    path = grid.out / f"{name}.png"
    title = grid.space.title
    if name == "table7":
        return [save_matrix_map(report.rows, path, title=title)]
    if spec.plot is None or all(row.get("accuracy") is None for row in report.rows):
        return []
    panels = tuple(axis for axis in ("model", "dataset") if axis != spec.by)
    if spec.plot == "bars":
        return [save_bars(report.rows, "method", panels=panels, path=path, title=title)]
    return [
        save_lines(
            report.rows,
            "ratio",
            by=str(spec.by),
            panels=panels,
            path=path,
            title=title,
        )
    ]
