"""The privacy card: a run's guarantee in words and as JSON, for whoever decides on its release.

Both are made from one :class:`~sapf_ray.privacy.card_facts.CardFacts`, and from nothing else.

Example::

    facts = gather(plan, ledger, config, model_name="glyphs-tiny", data_name="digits")
    privacy_card(facts)     # privacy_card.md
    card_json(facts)        # privacy_card.json
"""

from __future__ import annotations

import json

from sapf_ray.privacy.card_arithmetic import arithmetic
from sapf_ray.privacy.card_classes import classes_section
from sapf_ray.privacy.card_facts import CardFacts
from sapf_ray.privacy.card_guarantee import (
    guarantee,
    mechanisms,
    numbers,
    private_choice,
    uses,
    warnings,
    warnings_section,
)
from sapf_ray.privacy.card_label import label, label_section
from sapf_ray.privacy.card_trust import (
    limits,
    public,
    randomness,
    side_channels,
    skipped,
    trust,
    trust_model,
    unprotected,
    utility,
)

SECTIONS = (
    warnings_section,
    label_section,
    guarantee,
    numbers,
    mechanisms,
    private_choice,
    uses,
    classes_section,
    arithmetic,
    public,
    trust,
    side_channels,
    unprotected,
    randomness,
    skipped,
    utility,
    limits,
)
"""Facts to a section of the card, in its order; an empty one is left out."""


def privacy_card(facts: CardFacts) -> str:
    """Markdown text of the card."""
    protected = facts.protected
    sections = [
        f"# Privacy card\n\nSensitive data: **{facts.data}** "
        f"({protected.n_units:,} training {protected.unit}s). Public model: **{facts.model}**.",
        f"> {facts.claim.text}",
        *(section(facts) for section in SECTIONS),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_json(facts: CardFacts) -> str:
    """The card for machines: the facts, and what they imply in words.

    :meth:`CardFacts.from_dict` reads it back.
    """
    implied = {
        "warnings": list(warnings(facts)),
        "label": label(facts),
        "trust_model": trust_model(facts) if facts.reads_images else "",
    }
    return json.dumps(facts.to_dict() | implied, indent=2, ensure_ascii=False) + "\n"
