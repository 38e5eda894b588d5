"""What one unit of each stage's work costs on one device.

There are shipped rows, which stand in ``device_costs.yaml``, or a measurement of the user's own
(:mod:`sapf_ray.estimate.measurements`). All have the same form: some devices did so much work in so
many seconds.

>>> shipped_costs()["a6000"].stages["selection"][0].seconds
2160.0
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from sapf_ray.config import RunConfig
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.protocols import Task, epochs_in_all
from sapf_ray.grounding.head_price import candidates_an_image
from sapf_ray.models.catalog import PUBLIC_MODELS, KnownModel
from sapf_ray.models.vocabulary import guidance_of, known_prompts, ships_candidates
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.stages import Stage

UNITS: Mapping[str, str] = {
    Stage.LATENTS: "images encoded",
    Stage.GROUNDING: "denoising passes of images",
    Stage.SELECTION: "images scored",
    Stage.FINETUNE: "images in steps",
    Stage.EVOLUTION: "denoising passes of images",
    Stage.SYNTHESIS: "denoising passes of images",
    Stage.EVALUATION: "images x epochs x classifiers",
}
"""Stage to the unit of its work, in the order in which a run goes through them."""

_SD = "sd-v1-5"
_SD_SIDE = 512
# GFLOP of one forward pass of Stable Diffusion 1.5's U-Net at 512 pixels, by what they grow with:
# nothing, pixels, pixels squared (self-attention). Counted with torch's FlopCounterMode; the sum is
# exact at multiples of 64 pixels, a little low in between.
_SD_GFLOP = (3.01, 677.78, 122.48)


def sd_gflop(side: int) -> float:
    """10^9 operations of a forward pass of Stable Diffusion 1.5's U-Net.

    Args:
        side: Of the image, in pixels.

    >>> round(sd_gflop(512)), round(sd_gflop(256))
    (803, 180)
    """
    pixels = (side / _SD_SIDE) ** 2
    constant, linear, squared = _SD_GFLOP
    return constant + linear * pixels + squared * pixels**2


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
        if not rows and stage in (Stage.EVOLUTION, Stage.GROUNDING):
            rows = self.stages.get(Stage.SYNTHESIS, ())
        if not rows:
            return None
        if stage != Stage.FINETUNE:
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
    if plan.encodes:
        found[Stage.LATENTS] = plan.n_records
    if plan.vote is not None and not ships_candidates(config):
        found[Stage.GROUNDING] = _shown_images(config) * _shown_passes(config)
    if plan.finetune is not None:
        if plan.selection is not None:
            scored = plan.n_records * plan.selection.sample_rate
            passes_each = plan.selection.count * config.saliency.draws_per_record
            found[Stage.SELECTION] = scored * passes_each
        found[Stage.FINETUNE] = plan.batch_size * plan.steps * config.finetune.draws_per_record
    if plan.evolution is not None:
        found[Stage.EVOLUTION] = _evolved_images(config) * passes
    else:
        sampled = 1.0 if plan.head is None else candidates_an_image(config)
        found[Stage.SYNTHESIS] = synthesis.n_images * sampled * passes
    if evaluation.enabled:
        task = Task(data=config.data.source, side=evaluation.resolution or 0)
        found[Stage.EVALUATION] = synthesis.n_images * epochs_in_all(evaluation, task)
    return found


def parallel_parts(
    stage: str,
    config: RunConfig,
    *,
    plan: PrivacyPlan,
) -> int:
    """Number of parts into which a stage's work falls: more devices than that stand idle."""
    synthesis = config.synthesis
    shard_size = config.saliency.shard_size
    rate = plan.selection.sample_rate if plan.selection else 1.0
    parts: dict[str, float] = {
        Stage.LATENTS: plan.n_records / shard_size,
        Stage.SELECTION: plan.n_records * rate / shard_size,
        Stage.FINETUNE: plan.batch_size,
        Stage.EVALUATION: len(config.evaluation.classifiers),
    }
    by_images = synthesis.n_images / synthesis.shard_size
    return max(1, math.ceil(parts.get(stage, by_images)))


def _shown_images(config: RunConfig) -> float:
    """Number of images that show the candidates of a vote."""
    candidates = len(known_prompts(config.model.path))
    return candidates * config.grounding.candidate_images


def _shown_passes(config: RunConfig) -> int:
    """Number of denoising passes of each."""
    steps = config.grounding.candidate_steps
    return steps if guidance_of(config) == 1 else 2 * steps


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


def resolution_of(stage: str, config: RunConfig) -> int | None:
    """Side in pixels of the images that a stage works on; None where a model's own is not known."""
    if stage == Stage.SYNTHESIS and config.synthesis.resolution is not None:
        return config.synthesis.resolution
    if config.model.resolution is not None:
        return config.model.resolution
    known = _known(config.model.path)
    return None if known is None else known.resolution


def resolution_factor(costs: DeviceCosts, stage: str, config: RunConfig) -> float:
    """How much more arithmetic a pass of the stage has at its resolution than as measured.

    Counted for Stable Diffusion; other networks' passes are taken to grow with the pixels, which is
    the least. 1 where a resolution is unknown, and for evaluation: its images have their own size.
    """
    side = resolution_of(stage, config)
    if stage == Stage.EVALUATION or side is None or not costs.resolution:
        return 1.0
    if alike(costs.model, _SD):
        return sd_gflop(side) / sd_gflop(costs.resolution)
    return (side / costs.resolution) ** 2
