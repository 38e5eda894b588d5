"""What the benchmark writes: ``results.json``, ``results.md`` and the plots."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from jobs.bench.figures import TARGETS, Spread
from sapf_ray.files import write_atomic

COLORS = {
    "ours": "#1b6ca8",
    "plain": "#8a8a8a",
    "nonprivate": "#8a8a8a",
    "opacus_hooks": "#d1742f",
}
_OTHER_COLOR = "#555555"
_VERDICT_COLORS = {None: _OTHER_COLOR, True: "#2a7f3f", False: "#b3322c"}


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_model()
    return {
        "device": name,
        "cpus": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                _, _, model = line.partition(":")
                return model.strip()
    return platform.processor() or platform.machine()


def is_spread(value: Any) -> TypeGuard[Spread]:
    """Whether a result is a figure with minimum, median and maximum."""
    return isinstance(value, dict) and set(value) == {"min", "median", "max"}


def met(name: str, value: Spread) -> bool | None:
    """Whether the median reaches the issue's target; None where it has none."""
    if name not in TARGETS:
        return None
    comparison, bound = TARGETS[name]
    median = value["median"]
    if comparison == "≤":
        return median <= bound
    if comparison == "<":
        return median < bound
    return median >= bound


def markdown(results: dict[str, Any]) -> str:
    """Tables of the ratios, the absolute numbers and the failures."""
    where = results["machine"]
    lines = [
        f"Measured on {where['device']}, {where['threads']} thread(s) a contender, "
        f"torch {where['torch']}.",
        "",
        *_ratio_table(results),
        "",
        *_absolute_table(results["absolute"]),
    ]
    gemm = results["absolute"].get("gemm_gflop_per_s")
    if gemm:
        lines += ["", f"GEMM rate of one contender: {gemm:.0f} GFLOP/s."]
    if results["agreement"]:
        lines += ["", "Distance of the contenders' results from ours, in the same run:", ""]
        for name, row in results["agreement"].items():
            distances = ", ".join(f"{key} {value:.2g}" for key, value in row.items())
            lines.append(f"- {name}: {distances}")
    if results["failures"]:
        lines += ["", "Failed:", ""]
        lines += [f"- {name}: {text}" for name, text in results["failures"].items()]
    return "\n".join(lines) + "\n"


def _ratio_table(results: dict[str, Any]) -> list[str]:
    lines = ["| figure | median | min to max | target |", "|---|---|---|---|"]
    for name, value in results.items():
        if is_spread(value):
            median = f"{value['median']:.3g}"
            span = f"{value['min']:.3g} to {value['max']:.3g}"
            lines.append(f"| `{name}` | {median} | {span} | {_verdict(name, value)} |")
    return lines


def _verdict(name: str, value: Spread) -> str:
    reached = met(name, value)
    if reached is None:
        return ""
    comparison, bound = TARGETS[name]
    return f"{comparison} {bound:g}: {'met' if reached else 'missed'}"


# key of an absolute number → header and format
_ABSOLUTE = {
    "images_per_s": ("images/s", ".3g"),
    "seconds": ("seconds a step", ".3g"),
    "peak_mib": ("peak MiB", ".0f"),
    "mib_before_first_step": ("MiB before", ".0f"),
    "gflop_per_s": ("GFLOP/s", ".0f"),
    "share_of_gemm_rate": ("share of GEMM rate", ".0%"),
}


def _absolute_table(absolute: dict[str, Any]) -> list[str]:
    headers = ["contender", *[header for header, _ in _ABSOLUTE.values()]]
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for name, row in absolute.items():
        if not isinstance(row, dict) or "images_per_s" not in row:
            continue
        cells = [name]
        for key, (_, form) in _ABSOLUTE.items():
            value = row.get(key)
            if is_spread(value):
                value = value["median"]
            cells.append("" if value is None else format(value, form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot_ratios(results: dict[str, Any], path: Path) -> None:
    """Medians with min-max bars on a log axis.

    Growth figures and milliseconds, which are no ratios, are left to the table.
    """
    spreads = {name: value for name, value in results.items() if _is_ratio(name, value)}
    if not spreads:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(spreads)))
    for y, (name, value) in enumerate(spreads.items()):
        color = _VERDICT_COLORS[met(name, value)]
        ends = [value["min"], value["max"]]
        axes.plot(
            ends,
            [y, y],
            color=color,
            lw=2,
            solid_capstyle="round",
        )
        axes.plot(value["median"], y, "o", color=color, ms=5)
        if name in TARGETS:
            _, bound = TARGETS[name]
            axes.plot(bound, y, "|", color="black", ms=12)
    axes.axvline(
        1,
        color="#bbbbbb",
        lw=1,
        zorder=0,
    )
    axes.set_xscale("log")
    axes.set_yticks(range(len(spreads)), list(spreads), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio: median and min-max over rounds; bar = target (green met, red missed)")
    _without_frame(axes)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _is_ratio(name: str, value: Any) -> bool:
    if not is_spread(value) or value["min"] <= 0:
        return False
    return "growth" not in name and "_ms_per_" not in name


def _without_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Images/s above, memory above the state before the first step below; one column per curve."""
    columns = list(dict.fromkeys((row["group"], row["curve"]) for row in rows))
    if not columns:
        return
    figure, axes = plt.subplots(2, len(columns), figsize=(2.6 * len(columns), 5.2), squeeze=False)
    for column, (group, curve) in enumerate(columns):
        speed, memory = axes[:, column]
        members = [row for row in rows if (row["group"], row["curve"]) == (group, curve)]
        members = [row for row in members if "images_per_s" in row]
        for contender in dict.fromkeys(row["contender"] for row in members):
            points = [row for row in members if row["contender"] == contender]
            points.sort(key=lambda row: row["x"])
            _curve(speed, points, key="images_per_s", label=contender)
            _curve(memory, points, key="added_mib", label=contender)
        speed.set_title(f"{group}: {curve}", fontsize=8)
        for axis in (speed, memory):
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            _without_frame(axis)
        if speed.lines:
            speed.legend(fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("images/s", fontsize=8)
    axes[1, 0].set_ylabel("MiB above the state before the first step", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(
    axis: Any,
    points: list[dict[str, Any]],
    *,
    key: str,
    label: str,
) -> None:
    known = [point for point in points if key in point]
    axis.plot(
        [point["x"] for point in known],
        [point[key] for point in known],
        "o-",
        ms=3,
        lw=1.4,
        color=COLORS.get(label, _OTHER_COLOR),
        label=label,
    )


def write(results: dict[str, Any], out: Path) -> str:
    """Writes JSON, table and plot; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(results, indent=2, ensure_ascii=False)
    write_atomic(out / "results.json", content + "\n")
    text = markdown(results)
    write_atomic(out / "results.md", text)
    plot_ratios(results, out / "ratios.png")
    return text
