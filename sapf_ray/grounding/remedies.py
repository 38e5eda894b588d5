"""The table of remedies for class words that the public model does not know, or could know better.

Light to import; a remedy's parts are imported when it is chosen.

References:
    1. Lin et al. Differentially private synthetic data via foundation model APIs 1: Images. ICLR
       2024. (votes for the nearest candidate; here for prompts instead of images)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sapf_ray.privacy.facts import Facts
from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from sapf_ray.config import RunConfig
    from sapf_ray.privacy.calibration import Budget
    from sapf_ray.runs.context import RunContext

Suits: TypeAlias = "Callable[[RunConfig, Facts, Budget], bool]"
Noise: TypeAlias = "Callable[[Facts, Budget], float]"
Ground: TypeAlias = "Callable[[RunContext], dict[str, Any]]"

TOKENS_FROM = 1000.0
"""Records a class times epsilon. Measured on made-up digit words: beside a vote, tokens add four
points at 8,100 and cost three, within the scatter, at 810."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One row.

    Attributes:
        title: What it is, for tables and the card.
        reads: What it reads of the sensitive images.
        source: Where it comes from.
        suits: Whether ``grounding.remedies: auto`` chooses it.
        noise: Noise multiplier of its one release, in the plan's stage of the remedy's name, where
            ``grounding.NAME_noise_multiplier`` gives none; None where it releases nothing of its
            own.
        told_by: Remedy whose release tells this one's, too: beside it there is nothing to pay.
        groups: Whether it counts a group of images once (``data.groups``); a row of another
            package's that does not say so is refused there.
        ground: Its part of the stage ``grounding``: makes the release, and returns what
            ``grounding.json`` is to hold; None where it has no part there.
    """

    title: str
    reads: str
    source: str
    suits: Suits
    noise: Noise | None = None
    told_by: str | None = None
    groups: bool = False
    ground: Ground | None = None


def _words_unknown(config: RunConfig, facts: Facts, budget: Budget) -> bool:
    """And there are at least as many candidates as classes."""
    from sapf_ray.models.vocabulary import known_prompts

    given = config.grounding.candidates
    enough = given is not None or len(known_prompts(config.model.path)) >= facts.n_classes
    return enough and not facts.words_known


def _tokens_help(config: RunConfig, facts: Facts, budget: Budget) -> bool:
    """Where the words are unknown, and either no vote finds others, or noise does not drown the
    gradient of a single class: its tokens get all of the noise, but only its own records.
    """
    if facts.words_known or config.finetune.adapter != "lora":
        return False
    heard = facts.records_per_class * budget.epsilon >= TOKENS_FROM
    return config.privacy.non_private or heard or not _words_unknown(config, facts, budget)


def _vote_noise(facts: Facts, budget: Budget) -> float:
    from sapf_ray.grounding.price import vote_noise

    return vote_noise(facts, budget)


def _vote(run: RunContext) -> dict[str, Any]:
    from sapf_ray.grounding.vote import assign_prompts

    return assign_prompts(run)


def _head_suits(config: RunConfig, facts: Facts, budget: Budget) -> bool:
    """Where the class means stand above their noise, and features tell more than latents do. Also
    where the words are known: a prompt, even of known words, is shown wrongly now and then. What is
    trained on a head's labels learns from it, too: to compare adapters, leave it out.
    """
    from sapf_ray.grounding.head_price import head_suits
    from sapf_ray.models.feature_table import feature_row

    space = feature_row(config.grounding.features, config.model.path)
    return space != "latents" and head_suits(facts, budget)


def _head_noise(facts: Facts, budget: Budget) -> float:
    from sapf_ray.grounding.head_price import head_noise

    return head_noise(facts, budget)


def _head(run: RunContext) -> dict[str, Any]:
    from sapf_ray.grounding.head_stage import make_head

    return make_head(run)


def _named_only(config: RunConfig, facts: Facts, budget: Budget) -> bool:
    return False


def _proportions_noise(facts: Facts, budget: Budget) -> float:
    from sapf_ray.grounding.price import proportions_noise

    return proportions_noise(facts, budget)


def _proportions(run: RunContext) -> dict[str, Any]:
    from sapf_ray.grounding.proportions import find_proportions

    return find_proportions(run)


REMEDIES: Registry[Remedy] = Registry(
    "grounding.remedies",
    {
        "vote": Remedy(
            title="each class gets a prompt that the model knows, by a noisy vote of the records",
            reads="public features of every record: one vote for the nearest candidate",
            source="Lin et al. 2024, for prompts",
            groups=True,
            suits=_words_unknown,
            noise=_vote_noise,
            ground=_vote,
        ),
        "tokens": Remedy(
            title="learned class tokens, in fine-tuning's own steps",
            reads="what fine-tuning reads: one joint clip with the adapter's gradient",
            source="Gal et al. 2023 (textual inversion), under DP-SGD",
            groups=True,
            suits=_tokens_help,
        ),
        "head": Remedy(
            title="labels by a private classifier of public features",
            reads="public features of every record: one noisy sum of them and count a class",
            source="Tramèr, Boneh 2021 (features of public networks)",
            groups=True,
            suits=_head_suits,
            noise=_head_noise,
            ground=_head,
        ),
        "proportions": Remedy(
            title="classes as frequent among the synthetic images as among the records",
            reads="one noisy count a class; nothing beside a head, which has the counts",
            source="Dwork et al. 2006 (noisy histogram)",
            groups=True,
            suits=_named_only,
            noise=_proportions_noise,
            told_by="head",
            ground=_proportions,
        ),
    },
)
"""Name in ``grounding.remedies`` to row, in the order in which a run goes through them."""
