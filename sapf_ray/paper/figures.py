"""The paper's figures from the rows of a report.

Accuracy is above, FID below, and the paper's points are crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sapf_ray.evaluation.metrics import ACCURACY, METRICS
from sapf_ray.pictures import save_figure

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Score:
    """A line of panels: our key, the paper's key, label of the axis."""

    key: str
    paper_key: str | None
    label: str


def _scores(rows: Sequence[Row]) -> list[_Score]:
    """Accuracy, and Inception FID where some run has it, else the glyph FID."""
    distance = "fid" if any(row.get("fid") is not None for row in rows) else "fid_glyph"
    scores = []
    for name in (ACCURACY, distance):
        metric = METRICS[name]
        scores.append(_Score(key=name, paper_key=metric.paper_key, label=metric.short))
    return scores


def _panels(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        labels = tuple(row.get(key) for key in keys)
        panels.setdefault(labels, []).append(row)
    return panels


def _figure(
    panels: Mapping[tuple[Any, ...], Any],
    scores: Sequence[_Score],
    *,
    title: str,
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
        words = ", ".join(map(str, labels))
        axes[0][column].set_title(words, fontsize=9)
    for line, score in enumerate(scores):
        axes[line][0].set_ylabel(score.label)
    return figure, axes


def save_bars(
    rows: Sequence[Row],
    over: str,
    *,
    panels: Sequence[str],
    path: Path,
    title: str,
) -> Path:
    """One bar per value of ``over``; missing values have no bar.

    Args:
        rows: Rows of a report.
        over: Key whose values have a bar each.
        panels: Keys; each combination of their values has a panel.
        path: The picture.
        title: Its title.
    """
    scores = _scores(rows)
    parts = _panels(rows, panels)
    figure, axes = _figure(parts, scores, title=title)
    for column, part in enumerate(parts.values()):
        places = np.arange(len(part))
        names = [str(row[over]) for row in part]
        for line, score in enumerate(scores):
            axis = axes[line][column]
            axis.bar(
                places,
                _numbers(part, score.key),
                yerr=_numbers(part, f"{score.key}_sd", missing=0.0),
                color="#4878a8",
                label="ours",
            )
            if score.paper_key is not None:
                axis.plot(places, _numbers(part, score.paper_key), "kx", label="paper")
            axis.set_xticks(
                places,
                names,
                rotation=40,
                ha="right",
                fontsize=8,
            )
    axes[0][0].legend(fontsize=8)
    return save_figure(figure, path)


def save_lines(
    rows: Sequence[Row],
    over: str,
    *,
    by: str,
    panels: Sequence[str],
    path: Path,
    title: str,
) -> Path:
    """A line over the numbers ``over`` per value of ``by``.

    Args:
        rows: Rows of a report.
        over: Key of the numbers along the horizontal axis.
        by: Key whose values have a line each.
        panels: Keys; each combination of their values has a panel.
        path: The picture.
        title: Its title.
    """
    scores = _scores(rows)
    parts = _panels(rows, panels)
    figure, axes = _figure(parts, scores, title=title)
    for column, part in enumerate(parts.values()):
        for line, score in enumerate(scores):
            for (label,), members in _panels(part, (by,)).items():
                ordered = sorted(members, key=lambda row: row[over])
                _line(
                    axes[line][column],
                    ordered,
                    over=over,
                    score=score,
                    label=_line_label(by, label),
                )
        axes[1][column].set_xlabel(over)
    if _has_paper_values(rows, scores):
        axes[0][0].plot([], [], "kx", label="paper")  # its crosses have each line's colour
    axes[0][0].legend(fontsize=8)
    return save_figure(figure, path)


def _line(
    axis: Any,
    rows: Sequence[Row],
    *,
    over: str,
    score: _Score,
    label: str,
) -> None:
    """Our points with their deviations, and the paper's crosses in the same colour."""
    places = [row[over] for row in rows]
    drawn = axis.errorbar(
        places,
        _numbers(rows, score.key),
        marker="o",
        markersize=3,
        yerr=_numbers(rows, f"{score.key}_sd", missing=0.0),
        label=label,
    )
    if score.paper_key is not None:
        colour = drawn[0].get_color()
        axis.plot(places, _numbers(rows, score.paper_key), "x", color=colour)


def _line_label(by: str, label: Any) -> str:
    if not isinstance(label, float):
        return str(label)
    return f"ε = {label:g}" if by == "epsilon" else f"{label:g}"


def _has_paper_values(rows: Sequence[Row], scores: Sequence[_Score]) -> bool:
    keys = [score.paper_key for score in scores if score.paper_key]
    return any(row.get(key) is not None for row in rows for key in keys)


def _numbers(
    rows: Sequence[Row],
    key: str,
    *,
    missing: float = float("nan"),
) -> list[float]:
    values = [row.get(key) for row in rows]
    return [missing if value is None else float(value) for value in values]
