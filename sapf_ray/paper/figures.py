"""The paper's figures from the rows of a report: accuracy above, FID below, the paper's points as
crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sapf_ray.evaluation.metrics import ACCURACY, METRICS

Row = Mapping[str, Any]


def _scores(rows: Sequence[Row]) -> list[tuple[str, str | None, str]]:
    """(our key, the paper's key, axis label); Inception FID where some run has it, else the glyph
    FID.
    """
    distance = "fid" if any(row.get("fid") is not None for row in rows) else "fid_glyph"
    chosen = {name: METRICS[name] for name in (ACCURACY, distance)}
    return [(name, metric.paper_key, metric.short) for name, metric in chosen.items()]


def _panels(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return panels


def _figure(
    panels: Mapping[tuple[Any, ...], Any], rows: Sequence[Row], *, title: str
) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        2,
        len(panels),
        figsize=(3.6 * len(panels) + 1.2, 5.6),
        squeeze=False,
        layout="constrained",
        sharex="col",
    )
    figure.suptitle(title, fontsize=10)
    for column, labels in enumerate(panels):
        axes[0][column].set_title(", ".join(map(str, labels)), fontsize=9)
    for line, (_, _, label) in enumerate(_scores(rows)):
        axes[line][0].set_ylabel(label)
    return figure, axes


def save_figure(figure: Any, path: Path) -> Path:
    """Writes the picture, its folder where there is none, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def save_bars(
    rows: Sequence[Row], over: str, *, panels: Sequence[str], path: Path, title: str
) -> Path:
    """One bar per value of ``over``; a panel per combination of ``panels``. Missing values have no
    bar.
    """
    parts = _panels(rows, panels)
    figure, axes = _figure(parts, rows, title=title)
    for column, part in enumerate(parts.values()):
        places = np.arange(len(part))
        for line, (key, paper_key, _) in enumerate(_scores(rows)):
            axis = axes[line][column]
            axis.bar(
                places,
                [_number(row.get(key)) for row in part],
                yerr=[_number(row.get(f"{key}_sd"), 0.0) for row in part],
                color="#4878a8",
                label="ours",
            )
            if paper_key is not None:
                axis.plot(
                    places, [_number(row.get(paper_key)) for row in part], "kx", label="paper"
                )
            axis.set_xticks(
                places, [str(row[over]) for row in part], rotation=40, ha="right", fontsize=8
            )
    axes[0][0].legend(fontsize=8)
    return save_figure(figure, path)


def save_lines(
    rows: Sequence[Row], over: str, *, by: str, panels: Sequence[str], path: Path, title: str
) -> Path:
    """A line over the numbers ``over`` per value of ``by``; a panel per combination of ``panels``."""
    parts = _panels(rows, panels)
    figure, axes = _figure(parts, rows, title=title)
    for column, part in enumerate(parts.values()):
        for line, (key, paper_key, _) in enumerate(_scores(rows)):
            axis = axes[line][column]
            for (label,), members in _panels(part, (by,)).items():
                ordered = sorted(members, key=lambda row: row[over])
                places = [row[over] for row in ordered]
                drawn = axis.errorbar(
                    places,
                    [_number(row.get(key)) for row in ordered],
                    marker="o",
                    markersize=3,
                    yerr=[_number(row.get(f"{key}_sd"), 0.0) for row in ordered],
                    label=f"{'ε = ' if by == 'epsilon' else ''}{label:g}"
                    if isinstance(label, float)
                    else str(label),
                )
                if paper_key is not None:
                    axis.plot(
                        places,
                        [_number(row.get(paper_key)) for row in ordered],
                        "x",
                        color=drawn[0].get_color(),
                    )
        axes[1][column].set_xlabel(over)
    if any(
        row.get(paper_key) is not None
        for row in rows
        for _, paper_key, _ in _scores(rows)
        if paper_key
    ):
        axes[0][0].plot([], [], "kx", label="paper")  # its crosses have each line's colour
    axes[0][0].legend(fontsize=8)
    return save_figure(figure, path)


def _number(value: Any, missing: float = float("nan")) -> float:
    return missing if value is None else float(value)
