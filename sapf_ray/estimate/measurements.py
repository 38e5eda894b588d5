"""Costs from a measurement of the user's own.

It is the ``results.json`` of ``make bench``, or the ``metrics.json`` of a finished run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.errors import ConfigError, reason
from sapf_ray.estimate.costs import DeviceCosts, Measured, alike, parallel_parts, work
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.stages import Stage

_GB_PER_MIB = 2**20 / 1e9

# the benchmark's models that a run can have: size to model.path and side of the images
_BENCH_MODELS = {
    "embedded": ("glyphs-tiny", 32),
    "sd15-512": ("sd-v1-5", 512),
    "sd15-256": ("sd-v1-5", 256),
}
_BENCH_STAGES = {
    "selection": (Stage.SELECTION, "lora"),
    "lora": (Stage.FINETUNE, "lora"),
    "full": (Stage.FINETUNE, "full"),
    "synthesis": (Stage.SYNTHESIS, "lora"),
}


def read_costs(path: str, config: RunConfig) -> DeviceCosts:
    """A measurement of the user's own that serves ``config``'s model.

    Args:
        path: ``results.json`` of ``make bench``, or ``metrics.json`` of a finished run, in its run
            directory.
        config: The planned run.

    Raises:
        ConfigError: Neither of them, not readable, or without anything measured on this model.
    """
    place = Path(path).expanduser()
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _refused(path, f"is no JSON file ({reason(error)})") from error
    try:
        if isinstance(content, dict) and "absolute" in content:
            return _from_bench(content, path, config=config)
        if isinstance(content, dict) and "seconds" in content:
            return _from_run(content, place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        damage = f"{type(error).__name__}: {error}"
        raise _refused(path, f"is damaged ({damage})") from error
    raise _refused(
        path, "must be the results.json of `make bench` or the metrics.json of a finished run"
    )


def _refused(path: str, why: str) -> ConfigError:
    return ConfigError("--cluster_costs", path, why)


def _measured(path: str, rows: Iterable[tuple[str, Measured]]) -> dict[str, tuple[Measured, ...]]:
    """Rows by stage, without those that hold no measurement."""
    found: dict[str, tuple[Measured, ...]] = {}
    for stage, row in rows:
        if row.units > 0 and 0 < row.seconds < math.inf:
            found[stage] = (*found.get(stage, ()), row)
    if not found:
        raise _refused(path, "holds no measured stage")
    return found


def _from_run(metrics: Mapping[str, Any], path: Path) -> DeviceCosts:
    """A run's seconds over the work that its own config and plan say."""
    run = RunDirectory(path.parent)
    if not run.plan.is_file():
        raise _refused(
            str(path), f"must lie in its run directory: {run.plan.name} is not beside it"
        )
    config = run.read_config()
    plan = PrivacyPlan.from_dict(run.read_json(run.plan))
    gpus = _gpus_of(config)
    devices = max(1, round(gpus))
    memory = metrics.get("peak_gpu_memory_mb" if gpus else "peak_memory_mb", {})
    outside = metrics.get("orchestration", {})
    rows = []
    for stage, units in work(config, plan).items():
        if stage not in metrics["seconds"]:
            continue
        start = outside.get(stage, 0.0)
        # as if all devices had found work
        busy = min(1.0, parallel_parts(stage, config, plan=plan) / devices)
        memory_gb = None
        if stage in memory:
            memory_gb = memory[stage] * _GB_PER_MIB / devices
        row = Measured(
            seconds=(metrics["seconds"][stage] - start) * busy,
            units=units,
            memory_gb=memory_gb,
            adapter=config.finetune.adapter,
            ratio=config.saliency.ratio,
            start_seconds=start,
        )
        rows.append((stage, row))
    notes = ["each stage's own start-up is in its cost per unit: larger runs take less"]
    if outside:
        notes = ["what a stage spent outside its work is taken to stay the same, whatever the size"]
    if gpus:
        notes.append(f"the run is taken to have had {devices} GPUs, all in one machine")
    return DeviceCosts(
        title="GPU of that run" if gpus else "machine like that run's",
        source=str(path),
        model=config.model.path,
        stages=_measured(str(path), rows),
        devices=devices,
        dtype=config.model.dtype,
        start_seconds=outside.get("outside_stages", 0.0),
        notes=tuple(notes),
    )


def _gpus_of(config: RunConfig) -> float:
    """Number of GPUs that a run requests in its longest stage."""
    if config.evolution.enabled:
        return config.evolution.gpus
    if config.finetune.steps:
        return config.finetune.workers * config.finetune.gpus
    return config.synthesis.num_actors * config.synthesis.gpus


def _from_bench(
    results: Mapping[str, Any],
    path: str,
    *,
    config: RunConfig,
) -> DeviceCosts:
    """Our own contenders' rates, of the size that is the configured model."""
    found: dict[str, list[tuple[str, Measured]]] = {}
    dtypes = set()
    for name, row in results["absolute"].items():
        stage, _, size = name.removesuffix("/ours").partition("/")
        if not name.endswith("/ours") or stage not in _BENCH_STAGES or size not in _BENCH_MODELS:
            continue
        found.setdefault(size, []).append(_bench_row(stage, row))
        dtypes.add(row.get("dtype", ""))
    size = _fitting_size(found, config.model.path)
    if size is None:
        raise _refused(
            path,
            f"measured nothing on model.path {config.model.path}; it has "
            f"{', '.join(found) or 'none'}",
        )
    model, resolution = _BENCH_MODELS[size]
    machine = results["machine"]
    title = machine["device"]
    efficiency = None
    if not _on_gpu(results):
        title += f", {machine['threads']} core(s) of it"
        pair = results.get("workers2_speedup_finetune")  # always measured on CPU workers
        efficiency = pair["median"] / 2 if pair else None
    note = "rates are of the stages' inner loops: start-up, reading and Ray's part come on top"
    return DeviceCosts(
        title=title,
        source=f"{path}, {size}",
        model=model,
        stages=_measured(path, found[size]),
        resolution=resolution,
        dtype=dtypes.pop() if len(dtypes) == 1 else "",
        efficiency=efficiency,
        notes=(note,),
    )


def _bench_row(name: str, row: Mapping[str, Any]) -> tuple[str, Measured]:
    """Stage and measurement of one contender."""
    stage, adapter = _BENCH_STAGES[name]
    units = row["images_per_step"]
    if stage == Stage.SYNTHESIS:
        units *= row.get("passes_per_image", 0)  # older files have no number of passes
    measured = Measured(
        seconds=row["seconds"]["median"],
        units=units,
        memory_gb=row["peak_mib"] * 2**20 / 1e9,
        adapter=adapter,
        ratio=1.0 if adapter == "full" else 0.3,
    )
    return stage, measured


def _fitting_size(measured: Iterable[str], model: str) -> str | None:
    """The first of the benchmark's sizes that is, or may be, the configured model's.

    A model that the catalog does not know may be a copy of Stable Diffusion; the bundled ones are
    all known.
    """
    for size in _BENCH_MODELS:
        if size not in measured:
            continue
        same = alike(_BENCH_MODELS[size][0], model)
        if same or (same is None and size != "embedded"):
            return size
    return None


def _on_gpu(results: Mapping[str, Any]) -> bool:
    rows = [row for row in results["absolute"].values() if isinstance(row, dict)]
    return any(row.get("device", "cpu") != "cpu" for row in rows)
