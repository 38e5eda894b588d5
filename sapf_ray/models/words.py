"""Whether a public model knows the classes' words, measured before any budget is spent.

A text encoder gives every prompt states. Words that it knows differ: states of the bundled model's
own prompts are 14 apart at the median, and those of ``zero`` ... ``nine`` 3.5. Words that it does
not know fall together: ``0`` ... ``9`` are 0.4 apart, ``grade_a`` ... ``grade_j`` 1.1, and prompts
that differ only behind the last token it reads are equal. All of it is public, so it is free.

States may also differ without a meaning (``foo``, ``bar``). Of the bundled models all words are
known that they ever saw, so any other is told, however far apart the states are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sapf_ray.models.vocabulary import BUNDLED, known_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from sapf_ray.models.public_model import PublicModel

NEAR = 0.1
"""Two classes are nearly equal below this part of the median distance of known prompts."""

APART = 0.2
"""Classes are told apart where their own median distance is at least this part of it."""

SHOWN = 3  # pairs of classes that a message names


@dataclass(frozen=True, kw_only=True)
class Words:
    """What was measured.

    Attributes:
        known: Whether the model tells all classes apart as it does words that it knows.
        equal: Pairs of classes with one and the same condition.
        near: Pairs of classes that are nearly equal.
        spread: Median distance of two classes over that of two known prompts; 1 where it was not
            measured, as the prompts are the model's own.
        cut: Classes whose prompts are cut off.
        strange: Classes whose prompts have words that a bundled model never saw.
    """

    known: bool
    equal: tuple[tuple[str, str], ...] = ()
    near: tuple[tuple[str, str], ...] = ()
    spread: float = 1.0
    cut: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()

    def line(self, remedies: Sequence[str]) -> str | None:
        """What a user must know, with the remedy; None where the words are known.

        Args:
            remedies: Names of the remedies that the run will use.
        """
        if self.known:
            return None
        if self.equal:
            told = f"the model reads {_listed(self.equal)} as one and the same prompt"
            if self.cut:
                told += f" ({len(self.cut)} prompts are cut off)"
        elif self.near:
            told = f"the model hardly tells {_listed(self.near)} apart"
        elif self.spread < APART:
            told = "the model hardly tells the classes apart"
        else:
            told = f"the model was never shown the words of {', '.join(self.strange[:SHOWN])}"
            if len(self.strange) > SHOWN:
                told += f" and {len(self.strange) - SHOWN} more classes"
        if self.spread < APART:
            told += f" (classes differ {self.spread:.2g} times as much as words it knows)"
        if remedies:
            return f"class words are unknown: {told}; remedy: {', '.join(remedies)}"
        return (
            f"class words are unknown: {told}; their images will be mixed up: set "
            "grounding.remedies to auto, or use words that it knows (data.class_names, "
            "data.prompt_template)"
        )


def check_words(model: PublicModel, class_names: Sequence[str], prompts: Sequence[str]) -> Words:
    """Measures whether the model knows the classes' words; loads its text encoder at most.

    A class-conditional model has labels, and :meth:`PublicModel.check_classes` has found one for
    each class.

    Args:
        model: The public model.
        class_names: One per class.
        prompts: One per class.
    """
    known = known_prompts(model.config.path)
    if model.family.conditioned_on_labels:
        return Words(known=True)
    from sapf_ray.models.text_encoder import text_states

    states, cut = text_states(model.config, [*prompts, *known])
    n = len(prompts)
    found = compare(
        states[:n],
        states[n:],
        class_names=class_names,
        cut=[name for name, too_long in zip(class_names, cut, strict=False) if too_long],
    )
    if model.config.path not in BUNDLED:
        return found
    seen = {word for prompt in known for word in _words_of(prompt)}
    of_all = set.intersection(*(_words_of(prompt) for prompt in prompts))  # the template's
    strange = tuple(
        name
        for name, prompt in zip(class_names, prompts, strict=True)
        if _words_of(prompt) - of_all - seen
    )
    return replace(found, known=found.known and not strange, strange=strange)


def compare(
    classes: Tensor, known: Tensor, *, class_names: Sequence[str], cut: Sequence[str] = ()
) -> Words:
    """The same from states alone.

    Args:
        classes: (n, ...) states of the classes' prompts.
        known: (m, ...) states of prompts that the model knows.
        class_names: One per class.
        cut: Classes whose prompts are cut off.
    """
    import torch

    own = torch.cdist(classes.flatten(1).double(), classes.flatten(1).double())
    reference = torch.pdist(known.flatten(1).double()).median()
    rows, columns = torch.triu_indices(len(classes), len(classes), 1).tolist()
    relative = (own / reference)[rows, columns]
    pairs = [(class_names[i], class_names[j]) for i, j in zip(rows, columns, strict=True)]
    equal = tuple(pair for pair, d in zip(pairs, relative.tolist(), strict=True) if d < 1e-6)
    near = tuple(pair for pair, d in zip(pairs, relative.tolist(), strict=True) if d < NEAR)
    spread = float(relative.median()) if len(relative) else 1.0
    return Words(
        known=not near and spread >= APART,
        equal=equal,
        near=near,
        spread=round(spread, 4),
        cut=tuple(cut),
    )


def _words_of(prompt: str) -> set[str]:
    return set(re.findall(r"\w+", prompt.lower()))


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{first} and {second}" for first, second in pairs[:SHOWN])
    more = len(pairs) - SHOWN
    return f"{shown} and {more} more pairs" if more > 0 else shown
