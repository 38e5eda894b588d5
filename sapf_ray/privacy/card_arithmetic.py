"""The privacy card's section on what separates the computation from the proof.

References:
    1. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
"""

from __future__ import annotations

from sapf_ray.privacy.card_facts import MOST_VALUES, CardFacts, StageFacts


def arithmetic(facts: CardFacts) -> str:
    """What separates the proof, which is about real numbers, from the computation."""
    if not facts.reads_images:
        return ""
    unit = facts.unit
    items = [_sums(stage) for stage in facts.stages]
    if facts.private:
        items.append(_sampler(facts))
    return (
        "## How sums and noise are computed\n\n"
        f"Each {unit}'s contribution is clipped, rounded towards zero onto a grid, and added "
        "as integers. So a sum depends on the images alone, not on their order or on how the work "
        f"is spread, and one {unit} changes it by no more than the bound, to the last bit.\n\n"
        + "\n".join(items)
    )


def _sums(stage: StageFacts) -> str:
    line = (
        f"- {stage.title} ({stage.contribution}): bound C = {stage.bound:g}, grid of "
        f"{stage.grid:.3g}"
    )
    if stage.slack == 0:
        return f"{line};"
    return (
        f"{line}; these sums are too large to be kept as integers and are added as floating-point "
        f"numbers, whose rounding can let one image count up to {1 + stage.slack:.6g} C; the noise "
        "is larger by the same factor, which pays for it;"
    )


def _sampler(facts: CardFacts) -> str:
    text = (
        "- noise: a Gaussian rounded to the grid, drawn and added in integers, so that the last "
        "bits of a released number reveal nothing about the sum (Mironov 2012). Its cut-off tails "
        f"and finite bits add at most {facts.sampler_delta:.1g} to δ, for up to {MOST_VALUES:,} "
        "numbers a release"
    )
    if any(stage.mechanism != "gaussian" for stage in facts.stages):
        text += (
            ". The selection's mechanism adds floating-point noise instead, of which only an order "
            "or a comparison is released; that differs from the exact mechanism's with a "
            "probability of about 10⁻¹¹"
        )
    return f"{text}."
