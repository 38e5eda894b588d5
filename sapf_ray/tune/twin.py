"""A public stand-in for sensitive images, made by the public model: where settings are chosen for
nothing.

A twin is what the model draws from the classes' prompts before any fine-tuning, with as many
training and test images as the sensitive set. A grid on it reads no sensitive image, so that
looking at its scores costs no epsilon; its cells plan the noise that the real runs would have.
What it cannot show is the way from the public images to the sensitive ones: it tells settings that
work under the noise from those that do not, not how good the results will be.

References:
    1. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022. (what
       a choice by looking at runs on the sensitive images costs)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sapf_ray.config import DataConfig, RunConfig, config_hash
from sapf_ray.data.base import open_source
from sapf_ray.errors import ConfigError
from sapf_ray.tune.space import Cell

FOLDER = ".twins"  # in a grid's directory
SEED = 424_242
"""Seed of a twin's images: not one of those that its grid's synthetic images have."""


ON_TWINS = (
    "Public twins: what these cells train on, and are scored by, was drawn by the public model. No "
    "sensitive image was read; to choose settings by these scores costs nothing, and their ε is "
    "what the same settings will cost on the sensitive images."
)


def is_on_twin(cell: Cell) -> bool:
    """Whether a cell's images are a twin."""
    return cell.config.data.path is not None and FOLDER in Path(cell.config.data.path).parts


def template_of(class_names: tuple[str, ...], prompts: tuple[str, ...]) -> str | None:
    """The prompt template that gives these prompts; None where they have none in common.

    >>> template_of(("cat", "dog"), ("a cat, photo", "a dog, photo"))
    'a {name}, photo'
    """
    found = set()
    for name, prompt in zip(class_names, prompts, strict=True):
        if name not in prompt:
            return None
        found.add(prompt.replace(name, "{name}", 1))
    return found.pop() if len(found) == 1 else None


def twin_config(config: RunConfig) -> RunConfig:
    """The run that makes a cell's twin: the public model's images alone, without scores.

    Raises:
        DataError: The cell's images cannot be listed: their classes and number are the twin's.
    """
    source = open_source(config.data)
    return dataclasses.replace(
        config,
        seed=SEED,
        finetune=dataclasses.replace(config.finetune, steps=0),
        evolution=dataclasses.replace(config.evolution, enabled=False),
        grounding=dataclasses.replace(config.grounding, remedies="none"),
        synthesis=dataclasses.replace(
            config.synthesis,
            n_images=source.n_train + source.n_test,
            class_proportions=(),
            seed=None,
            resolution=None,
        ),
        evaluation=dataclasses.replace(config.evaluation, enabled=False),
        tracking=dataclasses.replace(config.tracking, enabled=False),
        privacy=dataclasses.replace(
            config.privacy, reproducible_seed=None, non_private=False, delta=None
        ),
    )


def twin_data(config: RunConfig, directory: Path) -> DataConfig:
    """The data section of a cell on its twin."""
    source = open_source(config.data)
    template = template_of(tuple(source.class_names), tuple(source.prompts))
    return DataConfig(
        source="parquet",
        path=str(directory / "synthetic"),
        prompt_template=template or config.data.prompt_template,
        test_fraction=source.n_test / (source.n_train + source.n_test),
    )


def on_twins(cells: list[Cell], out: Path, make: Callable[[RunConfig, str], object]) -> list[Cell]:
    """The cells with their twins for data; each twin is made once.

    Args:
        cells: Of a grid.
        out: The grid's directory.
        make: Runs a config in a directory (:func:`sapf_ray.pipeline.run`); finished runs are kept.

    Raises:
        ConfigError: A cell's data cannot have a twin.
        SapfError: A twin could not be made.
    """
    places: dict[str, Path] = {}
    found = []
    for cell in cells:
        config = cell.config
        if config.data.source == "stand_in":
            raise ConfigError(
                "data.source", "stand_in", "is public already: leave --public_twin out"
            )
        key = config_hash(config, "data", "model")
        if key not in places:
            places[key] = (out / FOLDER / key).resolve()
            make(twin_config(config), str(places[key]))
        data = twin_data(config, places[key])
        found.append(dataclasses.replace(cell, config=dataclasses.replace(config, data=data)))
    return found
