"""A run's entry for the DP Deployments Registry, as far as plan and ledger know it.

Who publishes the images, why, and where they come from only the publisher knows: those fields say
:data:`OPEN`.

References:
    1. OpenDP. Deployments registry, `schemas/deployments-schema.yaml`.
       github.com/opendp/deployments-registry-data, at commit 3e9c812. (the form)
    2. Ghazi, Nanayakkara, Vadhan. Work towards a registry of differential-privacy deployments.
       (the tiers)
"""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import yaml

from sapf_ray.privacy.card_facts import CardFacts
from sapf_ray.privacy.card_guarantee import guarantees, number, stage_words, warnings
from sapf_ray.privacy.card_trust import side_channel_items, trust_model

OPEN = "TO BE FILLED IN by the publisher"
HEAD = (
    "# Draft entry for the DP Deployments Registry (registry.opendp.org), made by sapf-ray from\n"
    "# plan and ledger. Copy it, fill in what says so, and correct the date.\n"
)


def is_registrable(facts: CardFacts) -> bool:
    """Whether there is a private release to register."""
    return facts.claim.release and guarantees(facts)


def registry_yaml(facts: CardFacts, *, published: date) -> str:
    """The entry as a file of the registry.

    Args:
        facts: Of a run that :func:`is_registrable`.
        published: When the results are published.
    """
    entry = registry_entry(facts, published=published)
    return HEAD + yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=100_000)


def registry_entry(facts: CardFacts, *, published: date) -> dict[str, Any]:
    """The entry as plain values; see :func:`registry_yaml`."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"synthetic images of {facts.data}".lower()).strip("-")
    return {
        "url_slug": slug,
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": _basic(facts, published),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"Labelled images, {facts.protected.n_units:,} training "
                f"{facts.unit}s.",
                "unprotected_quantities": _unprotected(facts),
            },
            "privacy_loss": _privacy_loss(facts),
            "deployment_model": {
                "model_name": "Central",
                "actors": trust_model(facts),
                "release_type": "One release",
                "release_type_details": "Further runs over the same images would add to ε.",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "post_processing": "Everything made from the noisy releases: optimizer steps, "
                "sampling of images, their selection and labels.",
                "composition": f"{facts.budget.spent.accountant} accountant of dp-accounting "
                f"{facts.software.dp_accounting}, over every event of the ledger.",
            },
            "implementation": _implementation(facts),
            "administrative": {"registry_authors": [OPEN]},
        },
    }


def _basic(facts: CardFacts, published: date) -> dict[str, Any]:
    adapter = ", and the fine-tuned model's adapter" if facts.trains else ""
    return {
        "name": f"Synthetic images of {facts.data}",
        "data_curators": [OPEN],
        "intended_use": OPEN,
        "data_product_type": "Synthetic data",
        "data_product_region": OPEN,
        "description": f"Synthetic images with labels{adapter}, made with sapf-ray "
        f"{facts.software.sapf_ray} from the public model {facts.model}.",
        "publication_date": published.isoformat(),
    }


def _privacy_loss(facts: CardFacts) -> dict[str, Any]:
    unit = "Image-level: one image and its label"
    if facts.unit == "group":
        unit = f"Group-level: all images of one group (data.groups: {facts.protected.groups})"
    strict = facts.budget.strict
    details = [f"At δ = 1/N² = {strict.delta:.3g}: ε = {number(strict.epsilon)}."]
    details += [warning.replace("**", "") for warning in warnings(facts)]
    return {
        "privacy_unit": unit,
        "privacy_unit_details": facts.protected.neighbours,
        "privacy_parameters": {"epsilon": round(facts.spent, 6), "delta": facts.delta},
        "privacy_parameters_details": " ".join(details),
    }


def _unprotected(facts: CardFacts) -> str:
    items = ["N, the names of the classes, the image size and the configuration"]
    if facts.unprotected.evaluation:
        items.append("scores on real images (not part of the data product)")
    if facts.unprotected.skipped:
        items.append("counts of images that could not be read (on the privacy card)")
    return f"{'; '.join(items)}."


def _implementation(facts: CardFacts) -> dict[str, str]:
    stages = "; ".join(stage_words(stage) for stage in facts.stages)
    channels = "; ".join(side_channel_items())
    return {
        "preprocessing_and_hyperparameter_tuning": "Images are scaled to a public size and encoded "
        "by the public model. Whether settings were chosen by looking at the sensitive images "
        f"sapf does not know: {OPEN}.",
        "mechanisms": f"{stages}. Contributions are clipped, rounded to a grid and added as "
        f"integers. Side channels: {channels}. What protects the images where they lie: {OPEN}.",
        "justification": OPEN,
    }
