"""What one unit of each stage's work costs on one device: shipped rows, or a measurement of the
user's own.

Shipped rows stand in ``device_costs.yaml``. The user's own come from the ``results.json`` of
``make bench`` or from the ``metrics.json`` of a finished run. All have the same form: some devices
did so much work in so many seconds.

>>> shipped_costs()["a6000"].stages["selection"][0].seconds
2160.0
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sapf_ray.config import RunConfig
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import ConfigError
from sapf_ray.models.catalog import CATALOG, KnownModel
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs.directory import RunDirectory

UNITS: Mapping[str, str] = {
    "latents": "images encoded",
    "selection": "images scored",
    "finetune": "images in steps",
    "evolution": "denoising passes of images",
    "synthesis": "denoising passes of images",
    "evaluation": "images x epochs x classifiers",
}
"""Stage to the unit of its work, in the order in which a run goes through them."""

# GFLOP of one forward pass of Stable Diffusion 1.5's U-Net, by side of the image in pixels
# (torch's FlopCounterMode)
SD15_GFLOP: Mapping[int, float] = {256: 180.1, 512: 803.3}


@dataclass(frozen=True)
class Measured:
    """One stage as measured.

    Args:
        seconds: Wall time that grows with the work.
        units: Work done in it, in :data:`UNITS`.
        memory_gb: Peak of one device, in 10^9 bytes; None where unknown.
        adapter: Of fine-tuning: ``finetune.adapter``.
        ratio: Of fine-tuning: ``saliency.ratio``.
        start_seconds: Wall time beside it, however much work there is.
    """

    seconds: float
    units: float
    memory_gb: float | None = None
    adapter: str = "lora"
    ratio: float = 0.3
    start_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """What is known of one kind of device.

    Args:
        title: What a device is, in words.
        source: Who measured, and how.
        model: ``model.path`` of the measured work.
        stages: Stage to its measurements; without those that are not known.
        devices: How many devices did the measured work together.
        resolution: Side of the images in pixels; 0 where unknown.
        dtype: ``model.dtype``; empty where unknown.
        start_seconds: Of a run, outside its stages.
        efficiency: Speed-up of fine-tuning per device beyond the measured number; None where not
            measured.
        notes: What else limits the numbers.
    """

    title: str
    source: str
    model: str
    stages: Mapping[str, tuple[Measured, ...]]
    devices: int = 1
    resolution: int = 0
    dtype: str = ""
    start_seconds: float = 0.0
    efficiency: float | None = None
    notes: tuple[str, ...] = ()

    def of(self, stage: str, config: RunConfig) -> Measured | None:
        """The measurement that is most like the configured run.

        Fine-tuning that was measured with other adapters only is scaled as the paper's Table 12 has
        the two.
        """
        rows = (
            self.stages.get(stage)
            or self.stages.get("synthesis" if stage == "evolution" else stage)
            or ()
        )
        if not rows:
            return None
        if stage != "finetune":
            return rows[0]
        adapter, ratio = config.finetune.adapter, config.saliency.ratio
        row = _nearest(rows, adapter, ratio=ratio)
        if row.adapter == adapter:
            return row
        paper = shipped_costs()["a6000"].stages[stage]
        more = (
            _nearest(paper, adapter, ratio=ratio).seconds
            / _nearest(paper, row.adapter, ratio=row.ratio).seconds
        )
        return replace(row, seconds=more * row.seconds, memory_gb=None)


def _nearest(rows: Iterable[Measured], adapter: str, *, ratio: float) -> Measured:
    return min(rows, key=lambda row: (row.adapter != adapter, abs(row.ratio - ratio)))


def work(config: RunConfig, plan: PrivacyPlan) -> dict[str, float]:
    """Stage to the expected work of a run, in :data:`UNITS`; without the stages that it skips."""
    synthesis, evaluation = config.synthesis, config.evaluation
    passes = synthesis.steps * (1 if synthesis.guidance_scale == 1 else 2)
    found: dict[str, float] = {}
    if plan.finetune is not None:
        found["latents"] = plan.n_records
        if plan.selection is not None:
            found["selection"] = plan.n_records * plan.selection.sample_rate * plan.selection.count
        found["finetune"] = plan.batch_size * plan.steps * config.finetune.draws_per_record
    if plan.evolution is not None:
        found["evolution"] = _evolved_images(config) * passes
    else:
        found["synthesis"] = synthesis.n_images * passes
    if evaluation.enabled:
        found["evaluation"] = synthesis.n_images * evaluation.epochs * len(evaluation.classifiers)
    return found


def pieces(stage: str, config: RunConfig, plan: PrivacyPlan) -> int:
    """Into how many pieces a stage's work falls: more devices than that stand idle."""
    synthesis, rate = config.synthesis, plan.selection.sample_rate if plan.selection else 1.0
    return max(
        1,
        math.ceil(
            {
                "latents": plan.n_records / config.saliency.shard_size,
                "selection": plan.n_records * rate / config.saliency.shard_size,
                "finetune": plan.batch_size,
                "evaluation": len(config.evaluation.classifiers),
            }.get(stage, synthesis.n_images / synthesis.shard_size)
        ),
    )


def _evolved_images(config: RunConfig) -> float:
    """Images that Private Evolution samples; each counts as a fresh one, though a variation takes
    fewer steps.
    """
    evolution, data = config.evolution, config.data.source
    classes = len(DATA_SETS[data].class_names) if data in DATA_SETS else 2
    return config.synthesis.n_images + classes * evolution.iterations * evolution.candidates * (
        1 + evolution.lookahead
    )


@functools.cache
def shipped_costs() -> Mapping[str, DeviceCosts]:
    """The rows of ``device_costs.yaml`` by name."""
    text = (resources.files("sapf_ray.estimate") / "device_costs.yaml").read_text(encoding="utf-8")
    return {name: _row(values) for name, values in yaml.safe_load(text).items()}


def _row(values: dict[str, Any]) -> DeviceCosts:
    stages = {
        stage: tuple(Measured(**{"seconds": 3600 * row.pop("hours", 0.0), **row}) for row in rows)
        for stage, rows in values.pop("stages").items()
    }
    return DeviceCosts(stages=stages, notes=tuple(values.pop("notes", ())), **values)


def read_costs(path: str, config: RunConfig) -> DeviceCosts:
    """A measurement of the user's own that serves ``config``'s model.

    Args:
        path: ``results.json`` of ``make bench``, or ``metrics.json`` of a finished run, in its run
            directory.

    Raises:
        ConfigError: Neither of them, not readable, or without anything measured on this model.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--cluster_costs", path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError("--cluster_costs", path, f"is no JSON file ({error})") from error
    try:
        if isinstance(content, dict) and "absolute" in content:
            return _from_bench(content, path, config=config)
        if isinstance(content, dict) and "seconds" in content:
            return _from_run(content, Path(path).expanduser())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "--cluster_costs", path, f"is damaged ({type(error).__name__}: {error})"
        ) from error
    raise ConfigError(
        "--cluster_costs",
        path,
        "must be the results.json of `make bench` or the metrics.json of a finished run",
    )


def _measured(path: str, stages: Iterable[tuple[str, Measured]]) -> dict[str, tuple[Measured, ...]]:
    found: dict[str, tuple[Measured, ...]] = {}
    for stage, row in stages:
        if row.units > 0 and 0 < row.seconds < math.inf:
            found[stage] = (*found.get(stage, ()), row)
    if not found:
        raise ConfigError("--cluster_costs", path, "holds no measured stage")
    return found


def _from_run(metrics: Mapping[str, Any], path: Path) -> DeviceCosts:
    """A run's seconds over the work that its own config and plan say."""
    run = RunDirectory(path.parent)
    if not run.plan.is_file():
        raise ConfigError(
            "--cluster_costs",
            str(path),
            f"must lie in its run directory: {run.plan.name} is not beside it",
        )
    config, plan = run.read_config(), PrivacyPlan.from_dict(run.read_json(run.plan))
    finetune, synthesis, evolution = config.finetune, config.synthesis, config.evolution
    gpus = (
        finetune.num_workers * finetune.gpus_per_worker
        if finetune.steps
        else synthesis.num_actors * synthesis.gpus_per_actor
    )
    if evolution.enabled:
        gpus = evolution.gpus_per_task
    devices = max(1, round(gpus))
    memory, mib = metrics.get("peak_gpu_memory_mb" if gpus else "peak_memory_mb", {}), 2**20 / 1e9
    idle = metrics.get("orchestration", {})
    rows = []
    for stage, units in work(config, plan).items():
        if stage in metrics["seconds"]:
            start, busy = idle.get(stage, 0.0), min(1.0, pieces(stage, config, plan) / devices)
            rows.append(
                (
                    stage,
                    Measured(
                        (metrics["seconds"][stage] - start) * busy,
                        units,  # as if all devices had found work
                        memory[stage] * mib / devices if stage in memory else None,
                        finetune.adapter,
                        config.saliency.ratio,
                        start,
                    ),
                )
            )
    notes = [
        "what a stage spent outside its work is taken to stay the same, whatever the size"
        if idle
        else "each stage's own start-up is in its cost per unit: larger runs take less"
    ]
    if gpus:
        notes.append(f"the run is taken to have had {devices} GPUs, all in one machine")
    return DeviceCosts(
        title="GPU of that run" if gpus else "machine like that run's",
        source=str(path),
        model=config.model.path,
        stages=_measured(str(path), rows),
        devices=devices,
        dtype=config.model.dtype,
        start_seconds=idle.get("outside_stages", 0.0),
        notes=tuple(notes),
    )


# the benchmark's models that a run can have: size to model.path and side of the images
_BENCH_MODELS = {
    "embedded": ("glyphs-tiny", 32),
    "sd15-512": ("sd-v1-5", 512),
    "sd15-256": ("sd-v1-5", 256),
}
_BENCH_STAGES = {
    "selection": ("selection", "lora"),
    "lora": ("finetune", "lora"),
    "full": ("finetune", "full"),
    "synthesis": ("synthesis", "lora"),
}


def _from_bench(results: Mapping[str, Any], path: str, *, config: RunConfig) -> DeviceCosts:
    """Our own contenders' rates, of the size that is the configured model."""
    found: dict[str, list[tuple[str, Measured]]] = {}
    types: set[str] = set()
    for name, row in results["absolute"].items():
        group, _, size = name.removesuffix("/ours").partition("/")
        if not name.endswith("/ours") or group not in _BENCH_STAGES or size not in _BENCH_MODELS:
            continue
        stage, adapter = _BENCH_STAGES[group]
        each = (
            row.get("passes_per_image", 0) if stage == "synthesis" else 1
        )  # files of before say no number of passes
        found.setdefault(size, []).append(
            (
                stage,
                Measured(
                    row["seconds"]["median"],
                    row["images_per_step"] * each,
                    row["peak_mib"] * 2**20 / 1e9,
                    adapter,
                    1.0 if adapter == "full" else 0.3,
                ),
            )
        )
        types.add(row.get("dtype", ""))
    same = {size: alike(_BENCH_MODELS[size][0], config.model.path) for size in found}
    # a model that the catalog does not know may be a copy of Stable Diffusion; the bundled ones
    # are all known
    fits = [
        size
        for size in _BENCH_MODELS
        if same.get(size) or (size in same and same[size] is None and size != "embedded")
    ]
    if not fits:
        raise ConfigError(
            "--cluster_costs",
            path,
            f"measured nothing on model.path {config.model.path}; it has {', '.join(found) or 'none'}",
        )
    model, resolution = _BENCH_MODELS[fits[0]]
    machine, notes = (
        results["machine"],
        ["rates are of the stages' inner loops: start-up, reading and Ray's part come on top"],
    )
    on_gpu = any(
        row.get("device", "cpu") != "cpu"
        for row in results["absolute"].values()
        if isinstance(row, dict)
    )
    pair = (
        None if on_gpu else results.get("workers2_speedup_finetune")
    )  # always measured on CPU workers
    return DeviceCosts(
        title=machine["device"] + ("" if on_gpu else f", {machine['threads']} core(s) of it"),
        source=f"{path}, {fits[0]}",
        model=model,
        stages=_measured(path, found[fits[0]]),
        resolution=resolution,
        dtype=types.pop() if len(types) == 1 else "",
        efficiency=pair["median"] / 2 if pair else None,
        notes=tuple(notes),
    )


def alike(measured: str, asked: str) -> bool | None:
    """Whether two values of ``model.path`` name networks of the same size; None where one of them
    is not known.
    """
    if measured == asked:
        return True
    first, second = _known(measured), _known(asked)
    if first is None or second is None:
        return None
    return (first.architecture, first.resolution) == (
        second.architecture,
        second.resolution,
    ) and math.isclose(first.parameters, second.parameters, rel_tol=0.02)


def _known(path: str) -> KnownModel | None:
    return next((row for row in CATALOG.values() if path in (row.name, row.hub_id) and path), None)


def check_model(costs: DeviceCosts, config: RunConfig) -> None:
    """The run's model must not be known to be of another size than the measured one.

    Raises:
        ConfigError: It is.
    """
    if alike(costs.model, config.model.path) is False:
        raise ConfigError(
            "model.path",
            config.model.path,
            f"the costs were measured on {costs.model}; ask for a model of its size, or give a "
            "measurement of this one with --cluster_costs",
        )


def model_notes(costs: DeviceCosts, config: RunConfig) -> list[str]:
    """What to keep in mind where the costs are those of another model."""
    path, notes = config.model.path, []
    if not alike(costs.model, path):
        notes.append(f"measured on {costs.model}: wrong for {path} unless it has the same size")
    if costs.dtype and costs.dtype != config.model.dtype:
        notes.append(f"measured in {costs.dtype}, the run asks model.dtype {config.model.dtype}")
    return notes


def resolution_factor(costs: DeviceCosts, config: RunConfig) -> float:
    """How much more arithmetic a pass has at the resolution of the run's model than at the measured
    one; 1 where unknown.
    """
    known = _known(config.model.path)
    if known is None or costs.resolution not in SD15_GFLOP or known.resolution not in SD15_GFLOP:
        return 1.0
    return SD15_GFLOP[known.resolution] / SD15_GFLOP[costs.resolution]
