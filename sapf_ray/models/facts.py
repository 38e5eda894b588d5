"""What is public of a run's data, read before its plan is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sapf_ray.config import RunConfig
from sapf_ray.config.grounding import AUTO, NONE
from sapf_ray.data.base import ImageSource
from sapf_ray.models.location import resolve_model
from sapf_ray.models.vocabulary import known_prompts
from sapf_ray.models.words import Words, check_words
from sapf_ray.privacy.facts import Facts

if TYPE_CHECKING:
    from sapf_ray.models.public_model import PublicModel


@dataclass(frozen=True)
class Found:
    """What was measured of the words, and the facts from which remedies are chosen."""

    words: Words
    facts: Facts


def find_facts(
    config: RunConfig, source: ImageSource, *, model: PublicModel | None = None
) -> Found:
    """Measures what a plan depends on; reads no image, and no weights but a text encoder's.

    Args:
        config: The whole experiment.
        source: The images.
        model: The public model; opened where it is needed by default.
    """
    words = _words(config, source, model=model)
    facts = Facts(
        n_records=source.n_units,
        n_classes=len(source.class_names),
        words_known=words.known,
    )
    return Found(words, facts)


def _words(config: RunConfig, source: ImageSource, *, model: PublicModel | None) -> Words:
    """Not measured in runs that ground nothing, where all prompts are the model's own, and in plans
    for a model that may have to be fetched first.
    """
    grounds_nothing = config.finetune.steps == 0 and config.grounding.remedies in (AUTO, NONE)
    if grounds_nothing or set(source.prompts) <= set(known_prompts(config.model.path)):
        return Words(known=True)
    if model is None:
        if not Path(resolve_model(config.model)).is_dir():
            return Words(known=True)  # of the hub: left to the run
        from sapf_ray.models.public_model import PublicModel

        model = PublicModel.open(config.model)
    return check_words(model, source.class_names, source.prompts)
