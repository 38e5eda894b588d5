"""Candidate prompts, each shown by images of the public model: all public, so all free.

Those of the bundled models are shipped in the package, as features under the default settings.
Features of other candidates of shipped vocabularies are kept in the user's cache folder, keyed by
all that decides them, so a second run makes none. Those of a user's own candidates or class words
stay in the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, RunConfig, SynthesisConfig
from sapf_ray.errors import ConfigError
from sapf_ray.files import short_hash, write_array
from sapf_ray.models.conditioning import encode_conditions, null_condition
from sapf_ray.models.device import pick_device
from sapf_ray.models.glyph_features import BUNDLED_FEATURES
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.public_features import Features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vocabulary import BUNDLED, guidance_of, known_prompts, read_candidates
from sapf_ray.runs import worktime
from sapf_ray.runs.context import RunContext
from sapf_ray.stages import Stage
from sapf_ray.synthesis.sampler import sample_images
from sapf_ray.synthesis.sampling_plan import image_seed

SEED = 0  # of the candidates' images: the same in all runs, so that they may share them
IMAGES_PER_TASK = 128
SHIPPED = BUNDLED_FEATURES
"""Where ``python -m jobs.public_features`` puts features, in half precision."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Candidates whose features are made, and kept, together.

    Attributes:
        prompts: At least one.
        folder: Where their features are kept.
    """

    prompts: tuple[str, ...]
    folder: Path


def groups(
    config: RunConfig, own: Sequence[str], *, model: PublicModel, private: Path
) -> list[Group]:
    """The candidates of a run.

    Args:
        config: The whole experiment.
        own: The classes' own prompts: candidates too, where the vocabulary is a list of nouns.
        model: The public model.
        private: Folder for what is not the same in all runs.
    """
    settings = config.grounding
    kept = cache_folder(settings.cache_dir)
    if settings.candidates is not None:
        return [Group(prompts=read_candidates(settings.candidates), folder=private)]
    path = config.model.path
    template = config.data.prompt_template
    known = known_prompts(path, template=template)
    if model.labels and path not in BUNDLED:
        names = [text.split(",")[0] for text in model.labels.values()]
        known = tuple(template.replace("{name}", name) for name in names)
    found = [Group(prompts=known, folder=kept)]
    more = tuple(prompt for prompt in own if prompt not in known)
    if more and path not in BUNDLED and not model.labels:
        found.append(Group(prompts=more, folder=private))
    return found


def check_vote(config: RunConfig, own: Sequence[str], *, model: PublicModel) -> None:
    """Finds what would stop a vote; reads nothing sensitive and spends nothing.

    Args:
        config: The whole experiment.
        own: The classes' own prompts.
        model: The public model.

    Raises:
        ConfigError: There is no candidate for each class, or the classes' labels are given.
    """
    if config.model.class_labels is not None:
        raise ConfigError(
            "model.class_labels",
            list(config.model.class_labels),
            "must be left out where grounding.remedies has vote, which chooses the labels",
        )
    parts = groups(config, own, model=model, private=Path())
    number = sum(len(part.prompts) for part in parts)
    if number < len(own):
        raise ConfigError(
            "grounding.candidates",
            config.grounding.candidates,
            f"must hold a prompt for each of the {len(own)} classes, has {number}; name a file "
            "with more, or leave vote out of grounding.remedies",
        )


def cache_folder(given: str | None) -> Path:
    """Where public features are kept: the given folder, or sapf-ray in the user's cache folder."""
    if given is not None:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "sapf-ray" / "candidates"


def show_candidates(run: RunContext, features: Features) -> tuple[tuple[str, ...], np.ndarray]:
    """The run's candidates, and features of the images that show each of them.

    Args:
        run: The run; none of its records is read.
        features: The feature space.

    Returns:
        Prompts, and float32 (candidates, images, d).
    """
    parts = groups(
        run.config, run.source.prompts, model=run.model, private=run.directory.private.resolve()
    )
    shown = [
        candidate_features(
            part,
            model=run.model,
            features=features,
            config=run.config,
            on_progress=run.report(Stage.GROUNDING),
        )
        for part in parts
    ]
    return tuple(prompt for part in parts for prompt in part.prompts), np.concatenate(shown)


def candidate_features(
    group: Group,
    *,
    model: PublicModel,
    features: Features,
    config: RunConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Features of the images that show each candidate: float32 (candidates, images, d).

    Args:
        group: The candidates.
        model: The public model.
        features: The feature space.
        config: Its section ``grounding`` says how many images there are and how they are sampled;
            a task takes what an actor of ``synthesis`` takes.
        on_progress: Called with (images done, images in all).
    """
    settings = config.grounding
    showing = Showing(
        prompts=group.prompts,
        model=model.config,
        features=features,
        images=settings.candidate_images,
        steps=settings.candidate_steps,
        guidance=guidance_of(config),
        sampling=config.synthesis,
    )
    files, dtype, _, *anew = model.shown_by
    shown_by = [files, dtype, features.key, *anew]
    if model.resolution != model.native_resolution:
        shown_by.append(str(model.resolution))
    key = short_hash(
        [
            shown_by,
            [showing.images, showing.steps, showing.guidance, SEED],
            list(group.prompts),
        ]
    )
    name = f"candidates-{key}.npy"
    for folder in (SHIPPED, group.folder):
        if (folder / name).exists():
            return np.load(folder / name).astype(np.float32)
    found = _make(showing, on_progress)
    group.folder.mkdir(parents=True, exist_ok=True)
    write_array(group.folder / name, found)
    return found


class Showing(NamedTuple):
    """What a task needs to know to show candidates."""

    prompts: tuple[str, ...]
    model: ModelConfig
    features: Features
    images: int
    steps: int
    guidance: float
    sampling: SynthesisConfig


def _make(showing: Showing, on_progress: Callable[[int, int], None]) -> np.ndarray:
    sampling = showing.sampling
    total = len(showing.prompts) * showing.images
    parts = np.array_split(np.arange(total), max(1, -(-total // IMAGES_PER_TASK)))
    shared = ray.put(showing)
    cpus = sampling.cpus_per_actor
    gpus = sampling.gpus
    task = _show.options(
        name="show candidates",
        num_cpus=cpus,
        num_gpus=gpus,
        scheduling_strategy=cluster.SPREAD,
    )
    finished = cluster.as_finished(
        lambda part: task.remote(shared, part), parts, window=cluster.in_flight(cpus, gpus)
    )
    found: np.ndarray | None = None
    done = 0
    for part, values in finished:
        if found is None:
            found = np.empty((total, values.shape[1]), np.float32)
        found[part] = values
        done += len(part)
        on_progress(done, total)
    assert found is not None
    return found.reshape(len(showing.prompts), showing.images, -1)


@ray.remote(max_retries=3)
@worktime.timed
def _show(showing: Showing, part: np.ndarray) -> np.ndarray:
    """Features (n, d) of n images, numbered over all candidates."""
    sampling = showing.sampling
    torch.set_num_threads(max(1, int(sampling.cpus_per_actor)))
    pipe: Any = kept_pipeline(showing.model, pick_device(sampling.gpus))
    conditions = encode_conditions(pipe, showing.prompts)
    null = null_condition(pipe)
    found = []
    for batch in np.array_split(part, -(-len(part) // sampling.batch_size)):
        made = sample_images(
            pipe,
            conditions[torch.from_numpy(batch // showing.images)],
            null=null,
            seeds=np.array([image_seed(SEED, int(i)) for i in batch], np.int64),
            steps=showing.steps,
            guidance_scale=showing.guidance,
        )
        found.append(showing.features(made))
    return np.concatenate(found)
