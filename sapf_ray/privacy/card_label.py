"""The privacy label: nine categories, a line or two each, for those who read no more than that.

References:
    1. Dibia et al. Communicating differential privacy: a privacy label. PoPETs 2026 (arXiv
       2507.15997). (the categories)
"""

from __future__ import annotations

from sapf_ray.privacy.card_facts import CardFacts
from sapf_ray.privacy.card_guarantee import number, stage_words, table, warnings


def label(facts: CardFacts) -> dict[str, str]:
    """Category to what this run states in it, plain text, in the label's order."""
    return {
        "privacy parameters": _parameters(facts),
        "unit": f"one {facts.unit}: {facts.protected.short}",
        "utility information": _utility(facts),
        "mechanism": _mechanism(facts),
        "hyperparameters": _hyperparameters(facts),
        "deployment model": "central: a trusted curator holds the images and adds the noise",
        "empirical privacy metrics": "none in this card; `sapf audit` measures a run made for it",
        "interpretation": _interpretation(facts),
        "other context": _context(facts),
    }


def label_section(facts: CardFacts) -> str:
    """The label as a table."""
    return "## In short\n\n" + table(list(label(facts).items()))


def _parameters(facts: CardFacts) -> str:
    if not facts.private:
        return "none: ε is infinite"
    if not facts.reads_images:
        return "none needed: no sensitive image was read"
    strict = facts.budget.strict
    return (
        f"(ε, δ)-differential privacy: ε = {number(facts.spent)} at δ = {facts.delta:.3g}; "
        f"ε = {number(strict.epsilon)} at δ = 1/N² = {strict.delta:.3g}"
    )


def _utility(facts: CardFacts) -> str:
    measured = "measured on real images, outside ε, and no part of this card"
    if not facts.unprotected.evaluation:
        measured = "not measured"
    return f"{measured}; what few images show (rare classes, minorities) is learned least"


def _mechanism(facts: CardFacts) -> str:
    if not facts.stages:
        return "none"
    return "; ".join(stage_words(stage) for stage in facts.stages)


def _hyperparameters(facts: CardFacts) -> str:
    if not facts.trains:
        return "in `config.yaml`; whoever chose them by looking at the images spent more than ε"
    return (
        f"expected batch of {facts.batch_size:,}, {facts.steps:,} steps; all are in `config.yaml`; "
        "whoever chose them by looking at the images spent more than ε"
    )


def _interpretation(facts: CardFacts) -> str:
    meaning = facts.meaning
    if not facts.private:
        return "nothing is promised"
    if not facts.reads_images:
        return "nothing can be learned of the sensitive images"
    if meaning is None:
        return "no accountant here tells what an attacker reaches against these mechanisms"
    attack = meaning.attacks[0]
    return (
        f"at {100 * attack.false_positive_rate:.3g} % false alarms an attacker finds at most "
        f"{attack.true_positive_rate:.3g} of the {facts.unit}s that took part; μ = "
        f"{meaning.mu:.4g}"
    )


def _context(facts: CardFacts) -> str:
    found = [warning.split("**")[1].rstrip(".") for warning in warnings(facts)]
    told = f"warnings: {', '.join(found)}; " if found else ""
    return f"{told}the public model must not have seen these images"
