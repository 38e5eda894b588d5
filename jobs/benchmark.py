"""Speed and memory of every stage against its rivals, side by side in one run.

    python -m jobs.benchmark --out runs/bench                     # what `make bench` runs; about 20
    minutes on 2 cores python -m jobs.benchmark --groups lora --size sd --repeats 9
    python -m jobs.benchmark --curves true --groups selection,lora
    python -m jobs.benchmark --device cuda --dtype bfloat16       # Stable Diffusion 1.5's
    architecture

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


def _names(option: str, text: str, *, allowed: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise ConfigError(option, name, "must be one of " + ", ".join(allowed))
    return names


def _log(text: str) -> None:
    print(text, flush=True)


def _gemm_rate(base: Case) -> float | None:
    """GFLOP/s of one contender's best matrix product."""
    measured, _ = measure(
        [Entry(label="gemm", contender="gemm", case=base, tuned=True)], 5, log=_log, flops=("gemm",)
    )
    if "gemm" not in measured or not measured["gemm"].flops:
        return None
    return measured["gemm"].flops / min(measured["gemm"].seconds) / 1e9


def _group(
    group: str, size: str, *, base: Case, repeats: int, only: list[str], results: dict[str, Any]
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
        _log(f"  {prefix}{name}: {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})")
    for label, m in measured.items():
        row = figures.absolute(m, results["absolute"].get("gemm_gflop_per_s")) | {
            "dtype": m.case.dtype
        }
        results["absolute"][f"{group}/{size}/{label}"] = row | (
            {"passes_per_image": PASSES} if group == "synthesis" else {}
        )
    for label, row in figures.agreement(group, measured).items():
        results["agreement"][f"{group}/{size}/{label}"] = row
    for label, text in failures.items():
        results["failures"][f"{group}/{size}/{label}"] = text
    _check_agreement(group, size, measured=measured, results=results)


def _check_agreement(
    group: str, size: str, *, measured: dict[str, Measured], results: dict[str, Any]
) -> None:
    """A rival that computes something else is no rival: it counts as a failure."""
    for label, row in figures.agreement(group, measured).items():
        if row.get("max_relative", 0.0) > figures.TOLERANCE[measured["ours"].case.dtype]:
            results["failures"][f"{group}/{size}/{label}: result"] = (
                f"differs from ours by {row['max_relative']:.2g} relative"
            )


def main(
    out: str = "runs/bench",
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
        repeats: Measured rounds after the one that warms up.
        ray_repeats: Rounds of the groups that run whole stages on Ray.
        device: cpu or cuda (the groups ray, workers and scheduling run on CPU).
        dtype: float32 or bfloat16.
        threads: Threads of each contender.
        curves: Also sweep pool size, batch, tokens, rank and N; writes curves.csv and curves.png.
        quick: Tiny model and one round: shows that everything runs, not how fast.
    """
    chosen = _names("groups", groups, allowed=GROUPS)
    default = (
        "tiny" if quick else "sd15-256,sd15-512" if device.startswith("cuda") else "sd,embedded"
    )
    sizes = _names("size", size or default, allowed=tuple(SIZES))
    if quick:
        repeats = ray_repeats = 1
    base = Case(size=sizes[0], batch=1, device=device, dtype=dtype, threads=threads)
    results: dict[str, Any] = {
        "machine": report.machine(device, threads),
        "absolute": {},
        "agreement": {},
        "failures": {},
    }
    only = [name.strip() for name in contenders.split(",") if name.strip()]
    if set(chosen) & set(figures.GROUPS) and (rate := _gemm_rate(base)):
        results["absolute"]["gemm_gflop_per_s"] = rate
    for group in chosen:
        for name in sizes if group in figures.GROUPS else ():
            if (group, name) in figures.CASES:
                _group(group, name, base=base, repeats=repeats, only=only, results=results)
                report.write(results, Path(out))
    on_ray = [group for group in chosen if group in ray_stages.GROUPS]
    if on_ray:
        ratios, absolute, failures = ray_stages.run(on_ray, ray_repeats, quick, _log)
        results |= ratios
        results["absolute"] |= absolute
        results["failures"] |= failures
    if SCHEDULING in chosen:
        results |= scheduling.run(ray_repeats, quick, _log)
    _log("\n" + report.write(results, Path(out)))
    if curves:
        rows = growth.run(
            sizes[0], base, min(repeats, 2), _log, chosen, quick
        ) + growth.worker_rows(results["absolute"])
        growth.write_csv(rows, Path(out) / "curves.csv")
        report.plot_curves(rows, Path(out) / "curves.png")
    return results


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
