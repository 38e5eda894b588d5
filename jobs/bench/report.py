"""What the benchmark writes: ``results.json``, ``results.md`` and the plots."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from jobs.bench.figures import TARGETS, Spread
from sapf_ray.files import write_atomic

COLORS = {"ours": "#1b6ca8", "plain": "#8a8a8a", "nonprivate": "#8a8a8a", "opacus_hooks": "#d1742f"}


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_model()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "cpus": os.cpu_count(), "threads": threads} | versions


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return (
        lines[0].split(":", 1)[1].strip() if lines else platform.processor() or platform.machine()
    )


def is_spread(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"min", "median", "max"}


def met(name: str, value: Spread) -> bool | None:
    """Whether the median reaches the issue's target; None where it has none."""
    if name not in TARGETS:
        return None
    comparison, bound = TARGETS[name]
    return {
        "≤": value["median"] <= bound,
        "<": value["median"] < bound,
        "≥": value["median"] >= bound,
    }[comparison]


def markdown(results: dict[str, Any]) -> str:
    """Tables of the ratios, the absolute numbers and the failures."""
    where = results["machine"]
    lines = [
        f"Measured on {where['device']}, {where['threads']} thread(s) a contender, torch {where['torch']}.",
        "",
        "| figure | median | min to max | target |",
        "|---|---|---|---|",
    ]
    for name, value in results.items():
        if is_spread(value):
            comparison, bound = TARGETS.get(name, ("", math.nan))
            verdict = {
                None: "",
                True: f"{comparison} {bound:g}: met",
                False: f"{comparison} {bound:g}: missed",
            }[met(name, value)]
            lines.append(
                f"| `{name}` | {value['median']:.3g} | {value['min']:.3g} to {value['max']:.3g} | {verdict} |"
            )
    lines += [
        "",
        "| contender | images/s | seconds a step | peak MiB | MiB before | GFLOP/s | share of GEMM rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["absolute"].items():
        if isinstance(row, dict) and "images_per_s" in row:
            cells = (
                [f"{row['images_per_s']:.3g}", f"{row['seconds']['median']:.3g}"]
                + [
                    f"{row[key]:.0f}" if key in row else ""
                    for key in ("peak_mib", "mib_before_first_step", "gflop_per_s")
                ]
                + [f"{row['share_of_gemm_rate']:.0%}" if "share_of_gemm_rate" in row else ""]
            )
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if results["absolute"].get("gemm_gflop_per_s"):
        lines += [
            "",
            f"GEMM rate of one contender: {results['absolute']['gemm_gflop_per_s']:.0f} GFLOP/s.",
        ]
    if results["agreement"]:
        lines += ["", "Distance of the contenders' results from ours, in the same run:", ""]
        lines += [
            f"- {name}: " + ", ".join(f"{k} {v:.2g}" for k, v in row.items())
            for name, row in results["agreement"].items()
        ]
    if results["failures"]:
        lines += ["", "Failed:", ""] + [
            f"- {name}: {text}" for name, text in results["failures"].items()
        ]
    return "\n".join(lines) + "\n"


def plot_ratios(results: dict[str, Any], path: Path) -> None:
    """Medians with min-max bars on a log axis; growth figures and milliseconds (not ratios) are
    left to the table.
    """
    spreads = {
        n: v
        for n, v in results.items()
        if is_spread(v) and "growth" not in n and "_ms_per_" not in n and v["min"] > 0
    }
    if not spreads:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(spreads)))
    for y, (name, value) in enumerate(spreads.items()):
        color = {None: "#555555", True: "#2a7f3f", False: "#b3322c"}[met(name, value)]
        axes.plot([value["min"], value["max"]], [y, y], color=color, lw=2, solid_capstyle="round")
        axes.plot(value["median"], y, "o", color=color, ms=5)
        if name in TARGETS:
            axes.plot(TARGETS[name][1], y, "|", color="black", ms=12)
    axes.axvline(1, color="#bbbbbb", lw=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(spreads)), list(spreads), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio: median and min-max over rounds; bar = target (green met, red missed)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Images/s above, memory above the state before the first step below; one column per curve."""
    columns = list(dict.fromkeys((row["group"], row["curve"]) for row in rows))
    if not columns:
        return
    figure, axes = plt.subplots(2, len(columns), figsize=(2.6 * len(columns), 5.2), squeeze=False)
    for c, (group, curve) in enumerate(columns):
        mine = [
            r for r in rows if (r["group"], r["curve"]) == (group, curve) and "images_per_s" in r
        ]
        for contender in dict.fromkeys(r["contender"] for r in mine):
            points = sorted((r for r in mine if r["contender"] == contender), key=lambda r: r["x"])
            for axis, key in zip(axes[:, c], ("images_per_s", "added_mib"), strict=True):
                known = [p for p in points if key in p]
                color = COLORS.get(contender, "#555555")
                axis.plot(
                    [p["x"] for p in known],
                    [p[key] for p in known],
                    "o-",
                    ms=3,
                    lw=1.4,
                    color=color,
                    label=contender,
                )
        axes[0, c].set_title(f"{group}: {curve}", fontsize=8)
        for axis in axes[:, c]:
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        if axes[0, c].lines:
            axes[0, c].legend(fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("images/s", fontsize=8)
    axes[1, 0].set_ylabel("MiB above the state before the first step", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(results: dict[str, Any], out: Path) -> str:
    """Writes JSON, table and plot; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    text = markdown(results)
    write_atomic(out / "results.md", text)
    plot_ratios(results, out / "ratios.png")
    return text
