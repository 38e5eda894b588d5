"""How long a planned run takes on this machine: what ``sapf init`` sizes by and ``sapf run`` says.

The bundled models' costs of a core (row ``core`` of ``device_costs.yaml``) are scaled by the speed
of this machine's cores, and by arithmetic for models of other sizes; GPUs are taken to be the
paper's. Reading the images' files comes on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from sapf_ray.config import RunConfig
from sapf_ray.estimate.cluster import estimate_run
from sapf_ray.estimate.costs import DeviceCosts, Measured, shipped_costs
from sapf_ray.estimate.machine import Machine
from sapf_ray.estimate.result import Cluster
from sapf_ray.placement import Gpus, placed
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.stages import Stage

START = "start"
"""Name of what is outside the stages: imports, checks, Ray up and down."""

CORE = "core"
GPU = "a6000"

# Seconds of a core for a MB of image files: a JPEG of 12 megapixels and 5.3 MB takes 0.14 s.
DECODING = 0.027


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of each stage, in order.

    Attributes:
        seconds: Stage, or ``start``, to seconds; without those that are not known.
        unknown: Stages whose time is not known.
        is_rough: Whether the model's size is all that is known of its costs.
        place: What it runs on, in words.
        on_gpus: Whether the longest stage runs on GPUs.
    """

    seconds: dict[str, float]
    unknown: tuple[str, ...]
    is_rough: bool
    place: str
    on_gpus: bool

    @property
    def total(self) -> float:
        """Seconds of all that is known."""
        return sum(self.seconds.values())

    def without(self, stages: Iterable[str]) -> Forecast:
        """What is left once these stages are done."""
        left = {name: value for name, value in self.seconds.items() if name not in set(stages)}
        return dataclasses.replace(self, seconds=left)

    def words(self) -> str:
        """The sum and its parts, in minutes."""
        parts = ", ".join(f"{name} {_minutes(value)}" for name, value in self.seconds.items())
        rough = " (roughly, by the model's size)" if self.is_rough else ""
        text = f"about {duration(self.total)} on {self.place}{rough}; minutes: {parts}"
        return f"{text}; not known: {', '.join(self.unknown)}" if self.unknown else text


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(40), duration(400), duration(40_000)
    ('1 minute', '7 minutes', '11 hours')
    """
    hours = seconds / 3600
    number, unit = (round(hours), "hour") if hours >= 1.5 else (round(60 * hours), "minute")
    number = max(1, number)
    return f"{number:,} {unit}{'s' * (number != 1)}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f}" if seconds < 600 else f"{seconds / 60:,.0f}"


def uses_gpus(config: RunConfig) -> bool:
    """Whether the run's longest stage requests GPUs."""
    if config.evolution.enabled:
        return config.evolution.gpus > 0
    if config.finetune.steps:
        return config.finetune.gpus > 0
    return config.synthesis.gpus > 0


def forecast(
    config: RunConfig,
    plan: PrivacyPlan,
    *,
    machine: Machine,
    image_bytes: int = 0,
    factor: float = 1.0,
) -> Forecast:
    """Time of each stage of a run on this machine, which it has to itself.

    Args:
        config: The run.
        plan: Its plan.
        machine: This machine.
        image_bytes: Size of all image files; 0 where unknown.
        factor: Arithmetic of a forward pass of its model against that of ``glyphs-tiny``
            (:func:`sapf_ray.estimate.arithmetic.size_factor`).
    """
    # memory as if none held two models: the slower of what may be chosen
    config = placed(config, Gpus(count=len(machine.gpus)), model_gb=math.inf)
    on_gpus = uses_gpus(config)
    if on_gpus:
        count = max(1, len(machine.gpus))
        costs = shipped_costs()[GPU]
        place = f"{count} GPU{'s' * (count != 1)}, taken to be as fast as an A6000"
    else:
        count = min(machine.cores, config.cluster.num_cpus or machine.cores)
        costs = scaled(shipped_costs()[CORE], speed=machine.speed, factor=factor)
        place = f"{count} core{'s' * (count != 1)}"
    cluster = Cluster(name=costs.title, count=count, costs=costs)
    estimate = estimate_run(config, plan, cluster=cluster)
    seconds = {START: costs.start_seconds}
    for name, stage in estimate.stages.items():
        if stage.hours is not None:
            seconds[name] = 3600 * stage.hours
    if Stage.LATENTS in seconds:
        seconds[Stage.LATENTS] += DECODING * image_bytes / 1e6 / machine.cores / machine.speed
    scoring = estimate.stages.get(Stage.EVALUATION)
    if scoring is not None and scoring.seconds_per_unit is not None:
        seconds[Stage.EVALUATION] += scoring.seconds_per_unit * _judged(config, plan.n_records)
    unknown = [name for name, stage in estimate.stages.items() if stage.hours is None]
    return Forecast(
        seconds=seconds,
        unknown=tuple(unknown),
        is_rough=on_gpus or not math.isclose(factor, 1.0, rel_tol=0.02),
        place=place,
        on_gpus=on_gpus,
    )


def _judged(config: RunConfig, n_records: int) -> int:
    """Images x epochs from which conditional fidelity's judge learns."""
    from sapf_ray.evaluation.judge import LEAST_IMAGES, LEAST_STEPS

    evaluation = config.evaluation
    images = min(n_records, max(LEAST_IMAGES, config.synthesis.n_images))
    steps = max(1, images // evaluation.batch_size)
    return images * max(evaluation.judge_epochs, math.ceil(LEAST_STEPS / steps))


def scaled(costs: DeviceCosts, *, speed: float, factor: float) -> DeviceCosts:
    """Costs on faster or slower devices, with a model of another size."""

    def row(stage: str, measured: Measured) -> Measured:
        size = 1.0 if stage == Stage.EVALUATION else factor
        return dataclasses.replace(
            measured,
            seconds=measured.seconds * size / speed,
            start_seconds=measured.start_seconds / speed,
        )

    return dataclasses.replace(
        costs,
        resolution=0,  # what another one costs is in the factor
        start_seconds=costs.start_seconds / speed,
        stages={
            stage: tuple(row(stage, measured) for measured in rows)
            for stage, rows in costs.stages.items()
        },
    )
