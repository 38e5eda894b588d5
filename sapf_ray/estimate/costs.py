"""What one unit of each stage's work costs on one device.

There are shipped rows, or a measurement of the user's own. Shipped rows stand in
``device_costs.yaml``. The user's own come from the ``results.json`` of ``make bench`` or from the
``metrics.json`` of a finished run. All have the same form: some devices did so much work in so many
seconds.

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
from sapf_ray.errors import ConfigError, reason
from sapf_ray.models.catalog import PUBLIC_MODELS, KnownModel
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One stage as measured.

    Attributes:
        seconds: Wall time that grows with the work.
        units: Work done in it, in :data:`UNITS`.
        memory_gb: Peak of one device, in 10^9 bytes; None where unknown.
        adapter: ``finetune.adapter``, where the stage is fine-tuning.
        ratio: ``saliency.ratio``, where the stage is fine-tuning.
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

    Attributes:
        title: What a device is, in words.
        source: Who measured, and how.
        model: ``model.path`` of the measured work.
        stages: Stage to its measurements; without those that are not known.
        devices: Number of devices that did the measured work together.
        resolution: Side of the images in pixels; 0 where unknown.
        dtype: ``model.dtype``; empty where unknown.
        start_seconds: Wall time of a run, outside its stages.
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
        rows = self.stages.get(stage, ())
        if not rows and stage == "evolution":
            rows = self.stages.get("synthesis", ())
        if not rows:
            return None
        if stage != "finetune":
            return rows[0]
        adapter = config.finetune.adapter
        ratio = config.saliency.ratio
        row = _nearest(rows, adapter, ratio=ratio)
        if row.adapter == adapter:
            return row
        paper = shipped_costs()["a6000"].stages[stage]
        wanted = _nearest(paper, adapter, ratio=ratio)
        measured = _nearest(paper, row.adapter, ratio=row.ratio)
        more = wanted.seconds / measured.seconds
        return replace(row, seconds=more * row.seconds, memory_gb=None)


def _nearest(
    rows: Iterable[Measured],
    adapter: str,
    *,
    ratio: float,
) -> Measured:
    return min(rows, key=lambda row: (row.adapter != adapter, abs(row.ratio - ratio)))


def work(config: RunConfig, plan: PrivacyPlan) -> dict[str, float]:
    """Stage to the expected work of a run, in :data:`UNITS`; without the stages that it skips."""
    synthesis = config.synthesis
    evaluation = config.evaluation
    guided = synthesis.guidance_scale != 1
    passes = 2 * synthesis.steps if guided else synthesis.steps
    found: dict[str, float] = {}
    if plan.finetune is not None:
        found["latents"] = plan.n_records
        if plan.selection is not None:
            scored = plan.n_records * plan.selection.sample_rate
            found["selection"] = scored * plan.selection.count
        found["finetune"] = plan.batch_size * plan.steps * config.finetune.draws_per_record
    if plan.evolution is not None:
        found["evolution"] = _evolved_images(config) * passes
    else:
        found["synthesis"] = synthesis.n_images * passes
    if evaluation.enabled:
        epochs = evaluation.epochs * len(evaluation.classifiers)
        found["evaluation"] = synthesis.n_images * epochs
    return found


def parallel_parts(
    stage: str,
    config: RunConfig,
    plan: PrivacyPlan,
) -> int:
    """Number of parts into which a stage's work falls: more devices than that stand idle."""
    synthesis = config.synthesis
    shard_size = config.saliency.shard_size
    rate = plan.selection.sample_rate if plan.selection else 1.0
    parts: dict[str, float] = {
        "latents": plan.n_records / shard_size,
        "selection": plan.n_records * rate / shard_size,
        "finetune": plan.batch_size,
        "evaluation": len(config.evaluation.classifiers),
    }
    by_images = synthesis.n_images / synthesis.shard_size
    return max(1, math.ceil(parts.get(stage, by_images)))


def _evolved_images(config: RunConfig) -> float:
    """Number of images that Private Evolution samples.

    Each counts as a fresh one, though a variation takes fewer steps.
    """
    evolution = config.evolution
    row = DATA_SETS.get(config.data.source)
    classes = len(row.class_names) if row else 2
    variations = evolution.candidates * (1 + evolution.lookahead)
    return config.synthesis.n_images + classes * evolution.iterations * variations


@functools.cache
def shipped_costs() -> Mapping[str, DeviceCosts]:
    """The rows of ``device_costs.yaml`` by name."""
    path = resources.files("sapf_ray.estimate") / "device_costs.yaml"
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _shipped(values) for name, values in rows.items()}


def _shipped(values: dict[str, Any]) -> DeviceCosts:
    stages = {}
    for stage, rows in values.pop("stages").items():
        measured = []
        for row in rows:
            seconds = 3600 * row.pop("hours", 0.0)
            measured.append(Measured(**{"seconds": seconds, **row}))
        stages[stage] = tuple(measured)
    notes = tuple(values.pop("notes", ()))
    return DeviceCosts(
        stages=stages,
        notes=notes,
        **values,
    )


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
        busy = min(1.0, parallel_parts(stage, config, plan) / devices)
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
        return config.evolution.gpus_per_task
    if config.finetune.steps:
        return config.finetune.num_workers * config.finetune.gpus_per_worker
    return config.synthesis.num_actors * config.synthesis.gpus_per_actor


_GB_PER_MIB = 2**20 / 1e9

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
    if stage == "synthesis":
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


def alike(measured: str, requested: str) -> bool | None:
    """Whether two values of ``model.path`` name networks of the same size.

    None where one of them is not known.
    """
    if measured == requested:
        return True
    first = _known(measured)
    second = _known(requested)
    if first is None or second is None:
        return None
    if first.architecture != second.architecture or first.resolution != second.resolution:
        return False
    return math.isclose(first.parameters, second.parameters, rel_tol=0.02)


def _known(path: str) -> KnownModel | None:
    if not path:
        return None
    for row in PUBLIC_MODELS.values():
        if path in (row.name, row.hub_id):
            return row
    return None


def check_measured_model(costs: DeviceCosts, config: RunConfig) -> None:
    """The run's model must not be known to be of another size than the measured one.

    Raises:
        ConfigError: It is.
    """
    if alike(costs.model, config.model.path) is False:
        raise ConfigError(
            "model.path",
            config.model.path,
            f"the costs were measured on {costs.model}; use a model of its size, or give a "
            "measurement of this one with --cluster_costs",
        )


def model_notes(costs: DeviceCosts, config: RunConfig) -> list[str]:
    """What to keep in mind where the costs are those of another model."""
    path = config.model.path
    notes = []
    if not alike(costs.model, path):
        notes.append(f"measured on {costs.model}: wrong for {path} unless it has the same size")
    if costs.dtype and costs.dtype != config.model.dtype:
        notes.append(
            f"measured in {costs.dtype}, the run requests model.dtype {config.model.dtype}"
        )
    return notes


def resolution_factor(costs: DeviceCosts, config: RunConfig) -> float:
    """How much more arithmetic a pass has at the resolution of the run's model than as measured.

    1 where unknown.
    """
    known = _known(config.model.path)
    if known is None or costs.resolution not in SD15_GFLOP or known.resolution not in SD15_GFLOP:
        return 1.0
    return SD15_GFLOP[known.resolution] / SD15_GFLOP[costs.resolution]
