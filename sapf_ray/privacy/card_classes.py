"""The privacy card's section on how classes are told to the public model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapf_ray.privacy.card_facts import CardFacts
from sapf_ray.registry import row


def classes_section(facts: CardFacts) -> str:
    """What remedies did for classes whose words the public model does not know; empty without
    any.
    """
    grounding = facts.grounding
    if not facts.remedies:
        return ""
    titles = [f"- {name}: {row('grounding.remedies', name).title};" for name in facts.remedies]
    text = "## How classes are told to the model\n\n" + "\n".join(titles)[:-1] + "."
    if "tokens" in facts.remedies:
        text += (
            "\n\nClass tokens were trained in fine-tuning's own releases, their gradient clipped "
            "jointly with that of the adapter's factors: they cost nothing beside it. They lie in "
            "`adapter/class_tokens.safetensors`, which `load_lora_weights` does not load; without "
            "them the adapter makes other images."
        )
    if "head" in grounding:
        text += f"\n\n{_head(grounding['head'])}"
    if "proportions" in grounding:
        shares = ", ".join(f"{share:.1%}" for share in grounding["proportions"])
        text += f"\n\nSynthetic images are made in the noisy proportions of the classes: {shares}."
    prompts = grounding.get("prompts")
    if not prompts:
        return text
    rows = "\n".join(f"| {name} | {prompt} |" for name, prompt in prompts.items())
    return (
        f"{text}\n\nThe vote assigned these prompts, which follow from its noisy table alone:\n\n"
        f"| class | prompt |\n|---|---|\n{rows}"
    )


def _head(head: Mapping[str, Any]) -> str:
    """What a private head did to the labels of synthetic images."""
    known = (
        f"The head is made of class means in {head['directions']} public directions of "
        f"{head['features']} features. Its noise alone would leave {head['reliability']:.0%} of "
        "its labels right"
    )
    if head["labels"] == "prompt":
        return f"{known}: too few, so labels are those of the prompts."
    how = "every class kept the images that most certainly show it"
    if head["labels"] == "relabel":
        how = "each image has its most likely label, whatever its prompt"
    return (
        f"{known}. Labels of synthetic images come from it and from their prompts together ({how}; "
        "the column `label_source` says from which). What is trained on them learns from the head, "
        "too: accuracy alone says little about how well images show their class."
    )
