"""Which contenders run, and what is made of them: two tables and their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jobs.bench.models import EMBEDDED, Case
from jobs.bench.process import Entry, Measured

Spread = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender of a group.

    Attributes:
        label: Name in figures and tables.
        contender: Name in :data:`jobs.bench.contenders.CONTENDERS`, without the group; by default
            the label.
        tuned: Runs with the allocator settings of our worker processes; rivals run with the stock
            ones.
        pool: Matrices of the pool; 0 is all.
    """

    label: str
    contender: str = ""
    tuned: bool = False
    pool: int = 0


_RIVALS = (
    Row(label="opacus_hooks"),
    Row(label="opacus_ghost"),
    Row(label="functorch"),
    Row(label="microbatch1"),
)
GROUPS: dict[str, tuple[Row, ...]] = {
    "selection": (
        Row(label="ours", tuned=True),
        Row(label="ours_pool12", contender="ours", tuned=True, pool=12),
        Row(label="plain"),
        Row(label="plain_tuned", contender="plain", tuned=True),
        *_RIVALS,
    ),
    "lora": (
        Row(label="ours", tuned=True),
        Row(label="nonprivate"),
        Row(label="nonprivate_tuned", contender="nonprivate", tuned=True),
        *_RIVALS,
    ),
    "full": (
        Row(label="ours", tuned=True),
        Row(label="nonprivate"),
        Row(label="nonprivate_tuned", contender="nonprivate", tuned=True),
        *_RIVALS,
    ),
    "synthesis": (
        Row(label="ours", tuned=True),
        Row(label="pipeline"),
        Row(label="pipeline_tuned", contender="pipeline", tuned=True),
    ),
}
# the size whose figures carry the plain names; another size's are prefixed with it
PRIMARY = {"selection": "sd", "lora": "sd", "full": "sd", "synthesis": EMBEDDED}

# records of a forward pass and, where not the same, of a step
CASES: dict[tuple[str, str], Case] = {
    ("selection", "sd"): Case(size="sd", batch=8),
    ("lora", "sd"): Case(size="sd", batch=8),
    ("full", "sd"): Case(size="sd", batch=4, records=8),
    ("selection", EMBEDDED): Case(size=EMBEDDED, batch=64),
    ("lora", EMBEDDED): Case(size=EMBEDDED, batch=64),
    ("full", EMBEDDED): Case(size=EMBEDDED, batch=32),
    ("synthesis", EMBEDDED): Case(size=EMBEDDED, batch=50, records=100),
    ("selection", "tiny"): Case(size="tiny", batch=2),
    ("lora", "tiny"): Case(size="tiny", batch=2),
    ("full", "tiny"): Case(size="tiny", batch=2, records=4),
    ("synthesis", "tiny"): Case(size="tiny", batch=2, records=4),
    ("selection", "sd15-256"): Case(size="sd15-256", batch=16),
    ("lora", "sd15-256"): Case(size="sd15-256", batch=16),
    ("full", "sd15-256"): Case(size="sd15-256", batch=2, records=4),
    ("synthesis", "sd15-256"): Case(size="sd15-256", batch=16, records=32),
    ("selection", "sd15-512"): Case(size="sd15-512", batch=8),
    ("lora", "sd15-512"): Case(size="sd15-512", batch=8),
    ("full", "sd15-512"): Case(size="sd15-512", batch=2, records=4),
    ("synthesis", "sd15-512"): Case(size="sd15-512", batch=8, records=16),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """``numerator / denominator - minus`` of one quantity, round by round.

    Attributes:
        quantity: ``seconds``, ``memory`` (peak bytes of the process, or of its CUDA tensors) or
            ``added`` (peak bytes less what was there before the first step).
    """

    name: str
    group: str
    numerator: str
    denominator: str
    quantity: str = "seconds"
    minus: float = 0.0


def _figures() -> list[Figure]:
    rows = [
        Figure(
            name="selection_time_vs_plain",
            group="selection",
            numerator="ours",
            denominator="plain",
        ),
        Figure(
            name="selection_time_vs_plain_same_allocator",
            group="selection",
            numerator="ours",
            denominator="plain_tuned",
        ),
        *(
            Figure(
                name=f"selection_speedup_vs_{r.label}",
                group="selection",
                numerator=r.label,
                denominator="ours",
            )
            for r in _RIVALS
        ),
        Figure(
            name="selection_memory_growth_12_to_96",
            group="selection",
            numerator="ours",
            denominator="ours_pool12",
            quantity="memory",
            minus=1.0,
        ),
        Figure(
            name="selection_added_memory_growth_12_to_96",
            group="selection",
            numerator="ours",
            denominator="ours_pool12",
            quantity="added",
            minus=1.0,
        ),
        Figure(
            name="selection_memory_vs_plain",
            group="selection",
            numerator="ours",
            denominator="plain",
            quantity="memory",
        ),
    ]
    for group, stem in (("lora", "dp_lora"), ("full", "full_dp")):
        for quantity in ("time", "memory", "added_memory"):
            field = {"time": "seconds", "memory": "memory", "added_memory": "added"}[quantity]
            rows += [
                Figure(
                    name=f"{stem}_{quantity}_vs_nonprivate",
                    group=group,
                    numerator="ours",
                    denominator="nonprivate",
                    quantity=field,
                ),
                Figure(
                    name=f"{stem}_{quantity}_vs_nonprivate_same_allocator",
                    group=group,
                    numerator="ours",
                    denominator="nonprivate_tuned",
                    quantity=field,
                ),
            ]
        rows += [
            Figure(
                name=f"{stem}_speedup_vs_{r.label}",
                group=group,
                numerator=r.label,
                denominator="ours",
            )
            for r in _RIVALS
        ]
    return [
        *rows,
        Figure(
            name="synthesis_speedup_vs_plain_pipeline",
            group="synthesis",
            numerator="pipeline",
            denominator="ours",
        ),
        Figure(
            name="synthesis_speedup_vs_plain_pipeline_same_allocator",
            group="synthesis",
            numerator="pipeline_tuned",
            denominator="ours",
        ),
    ]


FIGURES = _figures()

# issue's targets, on the median: name to (comparison, bound)
TARGETS: dict[str, tuple[str, float]] = {
    "selection_time_vs_plain": ("≤", 1.35),
    "selection_speedup_vs_opacus_hooks": ("≥", 3.0),
    "selection_speedup_vs_microbatch1": ("≥", 5.0),
    "selection_memory_growth_12_to_96": ("<", 0.10),
    "dp_lora_time_vs_nonprivate": ("≤", 1.15),
    "dp_lora_memory_vs_nonprivate": ("≤", 1.2),
    "dp_lora_speedup_vs_opacus_hooks": ("≥", 1.5),
    "full_dp_memory_vs_nonprivate": ("≤", 1.5),
    "synthesis_speedup_vs_plain_pipeline": ("≥", 1.5),
    "ray_train_time_vs_bare": ("≤", 1.10),
    "workers2_speedup_selection": ("≥", 1.8),
    "workers2_speedup_finetune": ("≥", 1.6),
    "workers2_speedup_synthesis": ("≥", 1.8),
}


def entries(group: str, case: Case) -> list[Entry]:
    return [
        Entry(
            label=row.label,
            contender=f"{group}/{row.contender or row.label}",
            case=replace(case, pool=row.pool),
            tuned=row.tuned,
        )
        for row in GROUPS[group]
    ]


def prefix(group: str, size: str) -> str:
    return "" if size == PRIMARY[group] else f"{size}/"


def spread(values: Sequence[float]) -> Spread:
    return {
        "min": float(min(values)),
        "median": float(np.median(values)),
        "max": float(max(values)),
    }


def _quantity(measured: Measured, quantity: str) -> np.ndarray:
    if quantity == "seconds":
        return np.array(measured.seconds)
    memory = np.array(measured.memory, dtype=float)
    # resident memory is counted in pages: a step that adds nothing still counts as one
    return memory if quantity == "memory" else np.maximum(memory - measured.baseline, 4096.0)


def ratios(group: str, measured: dict[str, Measured]) -> dict[str, Spread]:
    """The group's figures, of the contenders that did not fail."""
    out = {}
    for figure in FIGURES:
        if (
            figure.group == group
            and figure.numerator in measured
            and figure.denominator in measured
        ):
            top, bottom = (
                _quantity(measured[x], figure.quantity)
                for x in (figure.numerator, figure.denominator)
            )
            out[figure.name] = spread((top / bottom - figure.minus).tolist())
    return out


def absolute(measured: Measured, gemm_rate: float | None) -> dict[str, Any]:
    """Images/s, memory and arithmetic of one contender."""
    seconds = float(np.median(measured.seconds))
    row: dict[str, Any] = {
        "device": measured.case.device,
        "images_per_step": measured.case.n,
        "seconds": spread(measured.seconds),
        "images_per_s": measured.case.n / seconds,
        "peak_mib": max(measured.memory) / 2**20,
        "mib_before_first_step": measured.baseline / 2**20,
    }
    if measured.flops:
        row |= {
            "gflop_per_step": measured.flops / 1e9,
            "gflop_per_s": measured.flops / seconds / 1e9,
        }
        if gemm_rate:
            row["share_of_gemm_rate"] = row["gflop_per_s"] / gemm_rate
            row["seconds_at_gemm_rate"] = row["gflop_per_step"] / gemm_rate
    return row


def agreement(group: str, measured: dict[str, Measured]) -> dict[str, Any]:
    """How far the contenders' results lie from ours.

    The distance is relative (selection) or in grey levels (synthesis).
    """
    results = {label: m.result for label, m in measured.items() if m.result is not None}
    ours = results.pop("ours", None)
    if ours is None:
        return {}
    ours = ours.astype(float)
    # some matrices' gradients may be rounding noise or exactly zero
    scale = np.abs(ours).clip(min=1e-9 * np.abs(ours).max())
    out: dict[str, Any] = {}
    for label, other in results.items():
        if other.shape != ours.shape:
            continue
        difference = np.abs(ours - other.astype(float))
        if group == "synthesis":
            out[label] = {
                "max_grey_levels": float(difference.max()),
                "mean_grey_levels": float(difference.mean()),
            }
        else:
            out[label] = {"max_relative": float((difference / scale).max())}
    return out


RESULTS_OF = {
    "selection": ("ours", *(r.label for r in _RIVALS)),
    "synthesis": ("ours", "pipeline"),
    "lora": (),
    "full": (),
}
FLOPS_OF = {
    "selection": ("ours", "plain"),
    "lora": ("ours", "nonprivate"),
    "full": ("ours", "nonprivate"),
    "synthesis": (),
}
# largest relative difference between a rival's clipped norms and ours that rounding explains
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
