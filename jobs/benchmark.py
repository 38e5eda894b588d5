"""Speed and memory of every stage against its rivals, side by side in one run.

    python -m jobs.benchmark --out runs/bench  # what `make bench` runs; 20 minutes on 2 cores
    python -m jobs.benchmark --groups lora --size sd --repeats 9
    python -m jobs.benchmark --curves true --groups selection,lora
    python -m jobs.benchmark --device cuda --dtype bfloat16  # Stable Diffusion 1.5's architecture

Contenders are processes that take their steps in turn, so noise of the machine hits all alike;
figures are ratios within a round. Ours run with the allocator settings that ``sapf`` gives its
workers, rivals with the stock ones, and figures that end in ``_same_allocator`` compare with a
floor that has ours.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse

from jobs.bench import curves as growth
from jobs.bench import figures, ray_stages, report, scheduling
from jobs.bench.models import SIZES, Case
from jobs.bench.process import Entry, Measured, measure
from jobs.bench.synthesis import PASSES
from sapf_ray.errors import ConfigError

SCHEDULING = "scheduling"
GROUPS = (*figures.GROUPS, *ray_stages.GROUPS, SCHEDULING)


def _split(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    return [name for name in names if name]


def _names(
    option: str,
    text: str,
    *,
    allowed: tuple[str, ...],
) -> list[str]:
    names = _split(text)
    for name in names:
        if name not in allowed:
            raise ConfigError(option, name, f"must be one of {', '.join(allowed)}")
    return names


def _log(text: str) -> None:
    print(text, flush=True)


def _gemm_rate(base: Case) -> float | None:
    """GFLOP/s of one contender's best matrix product."""
    entry = Entry(
        label="gemm",
        contender="gemm",
        case=base,
        tuned=True,
    )
    measured, _ = measure([entry], 5, log=_log, flops=("gemm",))
    gemm = measured.get("gemm")
    if gemm is None or not gemm.flops:
        return None
    return gemm.flops / min(gemm.seconds) / 1e9


def _group(
    group: str,
    size: str,
    *,
    base: Case,
    repeats: int,
    only: list[str],
    results: dict[str, Any],
) -> None:
    """Measures one group on one size and adds it to the results."""
    with tempfile.TemporaryDirectory() as directory:
        case = replace(
            figures.CASES[group, size],
            device=base.device,
            dtype=base.dtype,
            threads=base.threads,
            directory=directory,
        )
        _log(f"{group} on {size}: {case.n} images a step, {case.batch} a forward pass")
        rows = [row for row in figures.entries(group, case) if not only or row.label in only]
        measured, failures = measure(
            rows,
            repeats,
            log=_log,
            flops=figures.FLOPS_OF[group],
            results=figures.RESULTS_OF[group],
        )
    prefix = figures.prefix(group, size)
    for name, value in figures.ratios(group, measured).items():
        results[prefix + name] = value
        span = f"{value['min']:.3f} to {value['max']:.3f}"
        _log(f"  {prefix}{name}: {value['median']:.3f} ({span})")
    place = f"{group}/{size}"
    gemm_rate = results["absolute"].get("gemm_gflop_per_s")
    for label, found in measured.items():
        row = figures.absolute(found, gemm_rate)
        row["dtype"] = found.case.dtype
        if group == "synthesis":
            row["passes_per_image"] = PASSES
        results["absolute"][f"{place}/{label}"] = row
    for label, text in failures.items():
        results["failures"][f"{place}/{label}"] = text
    _add_agreement(group, place, measured=measured, results=results)


def _add_agreement(
    group: str,
    place: str,
    *,
    measured: dict[str, Measured],
    results: dict[str, Any],
) -> None:
    """A rival that computes something else is no rival: it counts as a failure."""
    for label, row in figures.agreement(group, measured).items():
        results["agreement"][f"{place}/{label}"] = row
        tolerance = figures.TOLERANCE[measured["ours"].case.dtype]
        difference = row.get("max_relative", 0.0)
        if difference > tolerance:
            failure = f"differs from ours by {difference:.2g} relative"
            results["failures"][f"{place}/{label}: result"] = failure


def _default_sizes(device: str, *, quick: bool) -> str:
    if quick:
        return "tiny"
    if device.startswith("cuda"):
        return "sd15-256,sd15-512"
    return "sd,embedded"


def main(
    out: str = "runs/bench",
    *,
    groups: str = ",".join(GROUPS),
    size: str = "",
    contenders: str = "",
    repeats: int = 5,
    ray_repeats: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    curves: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Measures, prints the table and writes results.json, results.md and plots.

    Args:
        out: Directory of the results.
        groups: Comma-separated: selection, lora, full, synthesis, ray, workers, scheduling.
        size: Comma-separated rows of jobs.bench.models.SIZES; by default sd and embedded, on CUDA
            sd15-256 and sd15-512.
        contenders: Only these rows of the groups (comma-separated); by default all.
        repeats: Number of measured rounds after the one that warms up.
        ray_repeats: Number of rounds of the groups that run whole stages on Ray.
        device: cpu or cuda (the groups ray, workers and scheduling run on CPU).
        dtype: float32 or bfloat16.
        threads: Number of threads of each contender.
        curves: Also sweep pool size, batch, tokens, rank and N; writes curves.csv and curves.png.
        quick: Tiny model and one round: shows that everything runs, not how fast.
    """
    chosen = _names("groups", groups, allowed=GROUPS)
    sizes = _names("size", size or _default_sizes(device, quick=quick), allowed=tuple(SIZES))
    only = _split(contenders)
    if quick:
        repeats = 1
        ray_repeats = 1
    folder = Path(out)
    base = Case(
        size=sizes[0],
        batch=1,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    results: dict[str, Any] = {
        "machine": report.machine(device, threads),
        "absolute": {},
        "agreement": {},
        "failures": {},
    }
    in_turn = [group for group in chosen if group in figures.GROUPS]
    if in_turn:
        rate = _gemm_rate(base)
        if rate:
            results["absolute"]["gemm_gflop_per_s"] = rate
    for group in in_turn:
        for name in sizes:
            if (group, name) in figures.CASES:
                _group(
                    group,
                    name,
                    base=base,
                    repeats=repeats,
                    only=only,
                    results=results,
                )
                report.write(results, folder)
    on_ray = [group for group in chosen if group in ray_stages.GROUPS]
    if on_ray:
        ratios, absolute, failures = ray_stages.run(on_ray, ray_repeats, quick=quick, log=_log)
        results |= ratios
        results["absolute"] |= absolute
        results["failures"] |= failures
    if SCHEDULING in chosen:
        results |= scheduling.run(ray_repeats, quick=quick, log=_log)
    _log("\n" + report.write(results, folder))
    if curves:
        rows = growth.run(
            sizes[0],
            base,
            repeats=min(repeats, 2),
            log=_log,
            groups=chosen,
            quick=quick,
        )
        rows += growth.worker_rows(results["absolute"])
        growth.write_csv(rows, folder / "curves.csv")
        report.plot_curves(rows, folder / "curves.png")
    return results


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
