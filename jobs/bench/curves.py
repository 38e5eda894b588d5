"""Cost growth: images/s and memory against pool size, batch, tokens, rank and number of records."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.figures import CASES
from jobs.bench.models import Case
from jobs.bench.process import Entry, Log, measure

FIELDS = ("group", "curve", "contender", "x", "images_per_s", "peak_mib", "added_mib", "error")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One field of the case swept, all others as in the group's case.

    Attributes:
        field: Field of :class:`Case` that is swept.
        label: Axis label.
        contenders: Contenders of the group; ours runs with our allocator settings.
    """

    group: str
    field: str
    label: str
    values: tuple[int, ...]
    contenders: tuple[str, ...]


_SELECTION = ("ours", "plain", "opacus_hooks")
_LORA = ("ours", "nonprivate", "opacus_hooks")
CURVES = (
    Curve(
        group="selection",
        field="pool",
        label="matrices in the pool",
        values=(3, 12, 48, 96),
        contenders=_SELECTION,
    ),
    Curve(
        group="selection",
        field="batch",
        label="records per forward pass",
        values=(1, 4, 16),
        contenders=_SELECTION,
    ),
    Curve(
        group="selection",
        field="side",
        label="side of the latents",
        values=(8, 16, 32),
        contenders=_SELECTION,
    ),
    Curve(
        group="selection",
        field="records",
        label="records N",
        values=(8, 16, 32),
        contenders=_SELECTION,
    ),
    Curve(
        group="lora",
        field="rank",
        label="LoRA rank",
        values=(1, 4, 16, 64),
        contenders=_LORA,
    ),
    Curve(
        group="lora",
        field="batch",
        label="records per forward pass",
        values=(1, 4, 16),
        contenders=_LORA,
    ),
    Curve(
        group="lora",
        field="side",
        label="side of the latents",
        values=(8, 16, 32),
        contenders=_LORA,
    ),
    Curve(
        group="full",
        field="batch",
        label="records per forward pass",
        values=(1, 2, 4),
        contenders=("ours", "nonprivate", "opacus_hooks"),
    ),
)


def run(
    size: str,
    base: Case,
    *,
    repeats: int,
    log: Log,
    groups: Iterable[str],
    quick: bool,
) -> list[dict[str, Any]]:
    """One row per curve, contender and value; a fresh process for each, so that memory is its own.

    Args:
        size: Row of :data:`jobs.bench.models.SIZES`.
        base: Device, dtype and threads.
        repeats: Number of measured rounds.
        log: Called with one line per event.
        groups: Groups whose curves are swept.
        quick: First two values of each curve only.
    """
    rows: list[dict[str, Any]] = []
    for curve in CURVES:
        if curve.group not in groups or (curve.group, size) not in CASES:
            continue
        log(f"curve: {curve.group} against {curve.label}")
        for value in curve.values[: 2 if quick else None]:
            with tempfile.TemporaryDirectory() as directory:
                case = replace(
                    CASES[curve.group, size],
                    device=base.device,
                    dtype=base.dtype,
                    threads=base.threads,
                    directory=directory,
                )
                if curve.field == "batch":
                    case = replace(case, records=0)
                case = replace(case, **{curve.field: value})  # type: ignore[arg-type]
                entries = [
                    Entry(
                        label=c,
                        contender=f"{curve.group}/{c}",
                        case=case,
                        tuned=c == "ours",
                    )
                    for c in curve.contenders
                ]
                measured, failures = measure(entries, repeats, log=log)
            for contender in curve.contenders:
                row: dict[str, Any] = {
                    "group": curve.group,
                    "curve": curve.label,
                    "contender": contender,
                    "x": value,
                }
                if contender in measured:
                    m = measured[contender]
                    row |= {
                        "images_per_s": case.n / float(np.median(m.seconds)),
                        "peak_mib": max(m.memory) / 2**20,
                        "added_mib": (max(m.memory) - m.baseline) / 2**20,
                    }
                rows.append(row | {"error": failures.get(contender, "")})
    return rows


def worker_rows(absolute: dict[str, Any]) -> list[dict[str, Any]]:
    """The workers group's images/s as curves, one per stage."""
    rows = []
    for name, entry in absolute.items():
        stage, _, workers = name.partition("/")
        if workers.endswith(" workers"):
            rows.append(
                {
                    "group": stage,
                    "curve": "workers",
                    "contender": "ours",
                    "x": int(workers.split()[0]),
                    "images_per_s": entry["images_per_s"],
                }
            )
    return rows


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
