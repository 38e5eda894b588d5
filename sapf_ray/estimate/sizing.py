"""The size of a run that suits these images and this machine: what ``sapf init`` chooses.

All of it follows from public facts: number of images and classes, the machine, minutes. What was
tuned for the bundled model (learning rate, diffusion times, guidance) is the ``digits`` preset's.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sapf_ray.config import RunConfig, flatten, from_dict, nest
from sapf_ray.config.fields import fields
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.local import Forecast, forecast
from sapf_ray.estimate.machine import Machine
from sapf_ray.models.catalog import PUBLIC_MODELS, KnownModel
from sapf_ray.models.hub_cache import cached_pipeline
from sapf_ray.presets import load_preset
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.planner import PrivacyPlan, make_plan

MINUTES = 10.0
GPU_MINUTES = 120.0
"""Time that a run may take on GPUs, where Stable Diffusion takes the bundled model's place."""

GPU_MEMORY_GB = 15.0
"""Least memory of a GPU for Stable Diffusion's fine-tuning in bfloat16."""

_ORDER = list(fields())
_GIVEN = {"data.source": "how they lie there: see `sapf datasets`", "data.path": "your images"}
_STEPS = 60
_RECORDS = 1_297  # of the digits, for which these steps were chosen (on their public twin)
_FEWEST_IMAGES = 2_000
_MOST_IMAGES = 5_000
_IMAGES_PER_CLASS = 50
_MOST_WORKERS = 4
_MOST_DRAWS = 8
_SCORED = 20_000
_SCORED_ON_GPU = 2_000


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One key, its value, and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A run of the right size.

    Attributes:
        choices: Its keys that differ from the defaults, in order.
        config: The run.
        plan: Its privacy plan.
        forecast: Its times.
        notes: What else there is to know, one line each.
    """

    choices: tuple[Choice, ...]
    config: RunConfig
    plan: PrivacyPlan
    forecast: Forecast
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What listing tells of the images.

    Attributes:
        n_train: Number of training images.
        n_classes: Number of classes.
        file_bytes: Size of all files; 0 where unknown.
        words_known: Whether the model knows the classes' words.
        n_groups: Number of groups of training images where a group is the unit of privacy; 0 where
            each image is.
    """

    n_train: int
    n_classes: int
    file_bytes: int = 0
    words_known: bool = True
    n_groups: int = 0

    @property
    def n_units(self) -> int:
        """N of the plan: groups, or images."""
        return self.n_groups or self.n_train

    def plan(self, config: RunConfig) -> PrivacyPlan:
        """The plan of a run on them."""
        facts = Facts(
            n_records=self.n_units, n_classes=self.n_classes, words_known=self.words_known
        )
        return make_plan(config, self.n_units, facts=facts)


def choose(
    images: Images,
    machine: Machine,
    *,
    minutes: float | None = None,
    given: dict[str, Any] | None = None,
    cached: KnownModel | None = None,
    factor: float = 1.0,
) -> Sizing:
    """Chooses model, steps, batch and images.

    Args:
        images: What there is.
        machine: What it runs on.
        minutes: Time that the run may take; by default 10, or 120 on GPUs.
        given: Keys that the user sets; they are kept.
        cached: A text-to-image model that is in the hub's cache.
        factor: Size of a given model, see :func:`sapf_ray.estimate.local.forecast`.

    Raises:
        ConfigError: Too few images, or a given value outside its range.
    """
    given = given or {}
    if images.n_train < 10:
        raise ConfigError(
            "data.path",
            given.get("data.path"),
            f"holds {images.n_train} images to learn from; "
            "at least 10 are needed, and a useful result needs some hundreds",
        )
    on_gpu = can_train_large(machine) and cached is not None and "model.path" not in given
    base = _for_gpu(machine, cached) if on_gpu and cached else _for_cores(machine)
    if minutes is None:
        minutes = GPU_MINUTES if on_gpu else MINUTES
    base |= _budget(given) | _fixed(images, machine, scored=_SCORED_ON_GPU if on_gpu else _SCORED)
    made = _Made(base=base, given=given, images=images, machine=machine, factor=factor)
    sized = made.sized(made.affordable(60 * minutes))
    return dataclasses.replace(sized, notes=tuple(_notes(sized, machine, minutes=minutes)))


def can_train_large(machine: Machine) -> bool:
    """Whether a GPU holds Stable Diffusion's fine-tuning."""
    return any(gpu.memory_gb >= GPU_MEMORY_GB for gpu in machine.gpus)


def cached_model() -> KnownModel | None:
    """The first text-to-image model of ``sapf models`` that is in the hub's cache, whole."""
    for row in PUBLIC_MODELS.values():
        if row.hub_id and row.conditioning == "text" and cached_pipeline(row.hub_id):
            return row
    return None


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Runs that differ in the amount of training only."""

    base: dict[str, Choice]
    given: dict[str, Any]
    images: Images
    machine: Machine
    factor: float

    def sized(self, batch: int) -> Sizing:
        """The run with this batch size, or the given one."""
        choices = self._choices(batch)
        config = _config(choices)
        plan = self.images.plan(config)
        return Sizing(
            choices=tuple(choices.values()),
            config=config,
            plan=plan,
            forecast=self._forecast(config, plan),
            notes=(),
        )

    def affordable(self, seconds: float) -> int:
        """The batch size for which there is time, beside all that does not depend on it."""
        low, high = 8, 16
        each = (self._seconds(high) - self._seconds(low)) / (high - low)
        rest = self._seconds(low) - low * each
        return batch_size(self.images.n_units, (seconds - rest) / max(each, 1e-9))

    def _seconds(self, batch: int) -> float:
        """Time of a run; without the seconds that finding its noise takes."""
        config = _config(self._choices(min(batch, self.images.n_units)))
        privacy = dataclasses.replace(config.privacy, non_private=True)
        config = dataclasses.replace(config, privacy=privacy)
        return self._forecast(config, self.images.plan(config)).total

    def _forecast(self, config: RunConfig, plan: PrivacyPlan) -> Forecast:
        return forecast(
            config,
            plan,
            machine=self.machine,
            image_bytes=self.images.file_bytes,
            factor=self.factor,
        )

    def _choices(self, batch: int) -> dict[str, Choice]:
        steps = step_count(self.images.n_units)
        units = "groups" if self.images.n_groups else "images"
        chosen = [
            Choice(
                key="finetune.steps",
                value=steps,
                why=f"more {units} bear more steps: {_STEPS} at {_RECORDS:,}",
            ),
            Choice(
                key="finetune.batch_size",
                value=batch,
                why=f"expected {units} a step: as many as time allows, at most half of them",
            ),
            Choice(
                key="finetune.checkpoint_every",
                value=max(1, steps // 3),
                why="steps that an interrupted run repeats at most",
            ),
        ]
        given = [
            Choice(key=key, value=value, why=_GIVEN.get(key, "as requested"))
            for key, value in self.given.items()
        ]
        found = {choice.key: choice for choice in [*self.base.values(), *chosen, *given]}
        return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[0])))


def _config(choices: dict[str, Choice]) -> RunConfig:
    return from_dict(nest({key: choice.value for key, choice in choices.items()}))


def step_count(n_units: int) -> int:
    """Optimizer steps for N images, or groups: with more of them each step's noise weighs less,
    and more steps pay; with fewer, fewer.

    >>> [step_count(n) for n in (160, 1_297, 16_000)]
    [30, 60, 139]
    """
    steps = round(_STEPS * (n_units / _RECORDS) ** (1 / 3))
    return min(150, max(20, steps))


def batch_size(n_units: int, affordable: float) -> int:
    """Expected batch size: what is affordable, at most half the images or groups, at least 8.

    >>> batch_size(160, 1e6), batch_size(16_000, 1_790)
    (80, 1776)
    """
    size = max(8, min(n_units // 2, int(affordable)))
    return size if size < 64 else size - size % 16


def _for_cores(machine: Machine) -> dict[str, Choice]:
    """The bundled model on cores: the ``digits`` preset without its data and sizes."""
    tuned = {
        "finetune.learning_rate": "as tuned for this model on public fonts",
        "finetune.timestep_start": "diffusion times that say most of an image",
        "finetune.timestep_end": "",
        "finetune.ema_decay": "the average of the last steps is released",
        "synthesis.steps": "solver steps of an image",
        "synthesis.guidance_scale": "how much an image is pulled towards its class",
    }
    preset = flatten(load_preset("digits"))
    chosen = [
        Choice(
            key="model.path",
            value="glyphs-tiny",
            why="bundled, makes images of 32 x 32 pixels; what a CPU can train in minutes",
        ),
        Choice(
            key="finetune.num_workers",
            value=min(machine.cores, _MOST_WORKERS),
            why=f"this machine has {machine.cores} cores",
        ),
        Choice(key="finetune.micro_batch_size", value=64, why="images at a time on a worker"),
        *(Choice(key=key, value=preset[key], why=why) for key, why in tuned.items()),
    ]
    return {choice.key: choice for choice in chosen}


def _for_gpu(machine: Machine, model: KnownModel) -> dict[str, Choice]:
    gpus = len(machine.gpus)
    chosen = [
        Choice(
            key="model.path",
            value=model.name,
            why=f"in this machine's hub cache; makes images of {model.resolution} x "
            f"{model.resolution} pixels",
        ),
        Choice(key="model.dtype", value="bfloat16", why="half the memory"),
        Choice(key="saliency.gpus_per_task", value=1.0, why=f"this machine has {gpus} GPU(s)"),
        Choice(key="finetune.num_workers", value=gpus, why="one a GPU"),
        Choice(key="finetune.gpus_per_worker", value=1.0, why=""),
        Choice(key="synthesis.gpus_per_actor", value=1.0, why=""),
        Choice(key="synthesis.batch_size", value=16, why="images denoised together"),
        Choice(key="evaluation.gpus_per_task", value=1.0, why=""),
    ]
    return {choice.key: choice for choice in chosen}


def _budget(given: dict[str, Any]) -> dict[str, Choice]:
    """Keys that everybody should see, with their defaults."""
    if given.get("privacy.non_private"):
        return {}
    shown = {
        "privacy.epsilon": "smaller is more private and less like the images; 1 to 10",
        "evaluation.enabled": "false for a release: scores read test images outside the budget",
    }
    return {
        key: Choice(key=key, value=fields()[key].default, why=why) for key, why in shown.items()
    }


def _fixed(images: Images, machine: Machine, *, scored: int) -> dict[str, Choice]:
    """What does not depend on the time; ``scored`` images are enough to choose the matrices."""
    shards = 2 * max(machine.cores, 1)
    shard_size = min(512, max(50, math.ceil(images.n_train / shards)))
    n_images = max(_FEWEST_IMAGES, _IMAGES_PER_CLASS * images.n_classes)
    n_images = max(n_images, min(images.n_train, _MOST_IMAGES))
    n_images = 100 * math.ceil(n_images / 100)
    chosen = [
        Choice(
            key="saliency.sample_rate",
            value=float(f"{min(1.0, scored / images.n_units):.2g}"),
            why="share of the images that choose the matrices",
        ),
        Choice(
            key="saliency.shard_size",
            value=shard_size,
            why="images of one task: work for all cores",
        ),
        Choice(
            key="synthesis.n_images",
            value=n_images,
            why="synthetic images; any number costs no privacy, only time",
        ),
    ]
    if images.n_groups:
        draws = min(_MOST_DRAWS, max(1, round(images.n_train / images.n_groups)))
        chosen += [
            Choice(key=key, value=draws, why="images of a group in a step: as many as it has")
            for key in ("saliency.draws_per_record", "finetune.draws_per_record")
        ]
    return {choice.key: choice for choice in chosen}


def _notes(sized: Sizing, machine: Machine, *, minutes: float) -> list[str]:
    notes = []
    if sized.forecast.total > 66 * minutes:
        notes.append(
            f"takes more than {minutes:g} minutes even with the least training: lower "
            "synthesis.n_images, or take fewer images"
        )
    if sized.plan.finetune is not None and not sized.plan.non_private:
        noise = sized.plan.finetune.noise_multiplier / sized.plan.batch_size
        if noise > 0.02:
            notes.append(
                f"{sized.plan.n_records:,} {sized.plan.unit}s at ε = {sized.plan.epsilon:g} "
                "are few: noise will hide all but the coarse look of them"
            )
    if machine.gpus and sized.config.finetune.gpus == 0:
        hub_id = PUBLIC_MODELS["sd-v1-5"].hub_id
        notes.append(
            f"for larger images fetch a model for the GPU and start again: hf download {hub_id}"
        )
    return notes
