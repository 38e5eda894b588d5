"""The privacy card's sections on the guarantee: warnings, what it means, its numbers.

References:
    1. NIST SP 800-226. Guidelines for evaluating differential privacy guarantees. 2025. (what a
       claim must state, and its hazards)
    2. Ponomareva et al. How to DP-fy ML. JAIR 2023. (section 5.3: what to report)
    3. Dwork, Roth. The algorithmic foundations of differential privacy. 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sapf_ray.privacy.card_facts import CardFacts, Priced, StageFacts

STRONG, LARGE = 1.0, 10.0
"""Epsilon up to which a guarantee is commonly called strong, and above which it is flagged [1]."""


def number(value: float | None) -> str:
    """Epsilon for tables; ``n/a`` where an accountant does not know a mechanism."""
    if value is None:
        return "n/a"
    return "infinite" if math.isinf(value) else f"{value:.4f}"


def guarantees(facts: CardFacts) -> bool:
    """Whether there is a guarantee to speak of: something was released, and with noise."""
    return facts.private and facts.reads_images


def table(rows: Sequence[tuple[str, ...]], *header: str) -> str:
    """A Markdown table; without a header its first row is empty."""
    columns = len(rows[0])
    head = " | ".join(header) if header else " | ".join([""] * columns)
    lines = [f"| {head} |", "|" + "---|" * columns]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def warnings(facts: CardFacts) -> tuple[str, ...]:
    """Hazards of the claim, a sentence or two each; none where there is no claim."""
    if not guarantees(facts):
        return ()
    found = []
    if facts.spent > LARGE:
        found.append(
            f"**Large ε.** Above {LARGE:g} the bound by itself promises little: what protects is "
            "then at most how the mechanism does in practice, which `sapf audit` can measure and "
            "nothing proves."
        )
    n = facts.protected.n_units
    if facts.delta >= 1 / n:
        found.append(
            f"**Large δ.** δ = {facts.delta:.3g} is not below 1/N = {1 / n:.3g}: to publish one "
            f"{facts.unit} as it is would satisfy it."
        )
    elif facts.delta > 1 / n**2:
        strict = facts.budget.strict
        found.append(
            f"**δ is above 1/N².** NIST SP 800-226 asks for at most {strict.delta:.3g}. There "
            f"ε is {number(strict.epsilon)}, of the very same releases."
        )
    if facts.unit == "image":
        found.append(_images_are_not_people(facts))
    return tuple(found)


def _images_are_not_people(facts: CardFacts) -> str:
    text = (
        "**Images are not people.** The unit is one image, and how many images show the same "
        "person is not bounded."
    )
    if not facts.persons:
        return f"{text} Someone with several images has a larger ε, at the same δ."
    each = ", ".join(f"{person.epsilon:.4g} with {person.images}" for person in facts.persons)
    return (
        f"{text} For someone with several images ε is larger, at the same δ: at most {each} (by "
        "mixtures of Gaussians). Where people have several images, plan with `data.groups`."
    )


def warnings_section(facts: CardFacts) -> str:
    """Empty without warnings."""
    found = warnings(facts)
    if not found:
        return ""
    return "## Warnings\n\n" + "\n".join(f"- {warning}" for warning in found)


def guarantee(facts: CardFacts) -> str:
    """What the guarantee means."""
    text = "## What the guarantee means\n\n"
    if not facts.private:
        return text + "There is none: ε is infinite."
    if not facts.reads_images:
        return (
            f"{text}The synthetic images do not depend on the sensitive data set, so they reveal "
            "nothing about it."
        )
    made = "synthetic images"
    if facts.trains:
        made = "adapter, all its earlier states, the synthetic images"
    limit = (
        "The guarantee is for one *image*: for a person with several, see the warning above, or "
        "plan with `data.groups`."
    )
    if facts.unit == "group":
        limit = (
            "The guarantee is for one *group* as `data.groups` says whose an image is, however "
            "many images it has: a person in two groups, or in another's images, has less."
        )
    factor = math.exp(facts.spent) if facts.spent < 700 else math.inf
    return (
        f"{text}{facts.protected.neighbours} No outcome of this run is more than e^ε = "
        f"{factor:,.4g} times as likely with one of them as with the other, except with a "
        f"probability of δ = {facts.delta:.3g}; this bounds what anyone, whatever else they know, "
        f"can learn about one {facts.unit}'s presence or content. {limit} It covers the {made} and "
        "all that is computed from them.\n\n"
        f"{_attacks(facts)}The smaller ε, the stronger: ε of {STRONG:g} or less is commonly called "
        f"strong, from {STRONG:g} to {LARGE:g} weak, and above {LARGE:g} the bound by itself "
        "promises little. ε of claims that differ in δ, in the unit, or in what neighbours are "
        "cannot be compared."
    )


def _attacks(facts: CardFacts) -> str:
    """What an attacker reaches, from the trade-off curve."""
    meaning = facts.meaning
    if meaning is None:
        return ""
    unit = facts.unit
    rates = ", ".join(
        f"at most {attack.true_positive_rate:.3g} of those that did at a false-positive rate of "
        f"{100 * attack.false_positive_rate:.3g} %"
        for attack in meaning.attacks
    )
    return (
        f"Someone who tests which {unit}s took part, and knows everything but that, finds {rates}; "
        f"of a fair coin that decided on one {unit} they are right with a probability of at most "
        f"{meaning.coin:.3g}. These bounds come from what the {meaning.accountant} accountant "
        "says of all releases together at every ε. The run is about as private as "
        f"{meaning.mu:.4g}-GDP (μ, the smallest whose δ is at least the run's at every ε from 0 to "
        "the one claimed).\n\n"
    )


def numbers(facts: CardFacts) -> str:
    """The guarantee's numbers."""
    budget, protected = facts.budget, facts.protected
    spent = budget.spent
    source = "nominal: data.n_records" if protected.nominal else "counted"
    planned = f"{budget.planned:g}" if facts.private else "none, not private"
    rows = [
        ("Planned ε (upper limit)", planned),
        ("ε of the whole plan", number(budget.whole_plan)),
        ("ε spent", f"{number(spent.epsilon)} ({spent.accountant} accountant)"),
        *((_by(other), number(other.epsilon)) for other in budget.others),
        (f"ε spent, at δ = 1/N² = {budget.strict.delta:.3g}", number(budget.strict.epsilon)),
        ("δ", f"{facts.delta:.4g} ({facts.delta * protected.n_units:.2g} / N)"),
        ("Neighbouring data sets", protected.short),
        (f"{facts.unit.title()}s, N", f"{protected.n_units:,} ({source})"),
    ]
    if facts.meaning is not None:
        rows.append(("μ (Gaussian differential privacy)", f"{facts.meaning.mu:.4g}"))
    if facts.trains:
        rows.append(("Expected batch size, steps", f"{facts.batch_size:,}, {facts.steps:,}"))
    histograms = [stage for stage in facts.stages if stage.stage == "evolution"]
    for stage in histograms:
        rows.append((f"Noisy histograms, {stage.contribution}", f"{stage.count:,}"))
    software = facts.software
    rows.append(
        ("Computed by", f"sapf-ray {software.sapf_ray}, dp-accounting {software.dp_accounting}")
    )
    return "## Numbers\n\n" + table(rows)


def _by(other: Priced) -> str:
    return f"ε spent, by the {other.accountant} accountant"


def mechanisms(facts: CardFacts) -> str:
    """Each stage's mechanism as planned; empty where no sensitive image is read."""
    if not facts.stages:
        return ""
    rows = [
        (
            stage.title,
            MECHANISMS.get(stage.mechanism, stage.mechanism),
            f"{stage.noise_multiplier:g}",
            f"{stage.bound:g} ({stage.contribution})",
            f"{stage.sample_rate:.6g}",
            f"{stage.count:,}",
            "n/a" if stage.share is None else f"{stage.share:.2%}",
        )
        for stage in facts.stages
    ]
    header = ("stage", "mechanism", "σ", "C", "q", "T", "share of the cost")
    each = f"{'an' if facts.unit == 'image' else 'a'} {facts.unit}"
    return (
        "## Mechanisms\n\n"
        + table(rows, *header)
        + f"\n\nσ is the noise multiplier: the noise has standard deviation σC, where one "
        f"{facts.unit} changes the sum by at most C in Euclidean norm. q is the probability with "
        f"which {each} takes part in one release, T the number of releases. Shares are of "
        "the Rényi divergence at the order that gives ε. Whoever doubts the accounting can repeat "
        "it from this table."
    )


MECHANISMS = {
    "gaussian": "Gaussian",
    "exponential": "exponential (σ of the Gaussian release that costs as much)",
    "propose_test_release": "propose-test-release (σ: scale of its Laplace noise)",
}


def private_choice(facts: CardFacts) -> str:
    """How this run was chosen among trials; empty in a run that was not."""
    repeat = facts.repeat
    if not repeat:
        return ""
    drawn = repeat["distribution"].replace("_", " ")
    return (
        "## A private choice\n\n"
        f"This run is the best of a random, secret number of trials ({drawn}, mean "
        f"{repeat['mean']:g}), which were scored on {repeat['held_out']:,} {facts.unit}s that none "
        "was trained on. ε is that of all trials together, of which this one alone is released "
        "(Papernot and Steinke, ICLR 2022); the tables show this trial's own releases."
    )


def uses(facts: CardFacts) -> str:
    """Every use of the sensitive images, as the ledger has it."""
    text = "## Every use of the sensitive images\n\n"
    if not facts.uses:
        return text + "None."
    unit = facts.unit
    rows = [
        (use.stage, use.mechanism, f"{use.charged:,}", f"{use.replays:,}") for use in facts.uses
    ]
    return (
        text
        + table(rows, "stage", "mechanism", "charged", "replays")
        + "\n\n*Noise* is the standard deviation of the Gaussian noise over the most that one "
        f"{unit} can contribute; *Poisson sample* is the probability with which each {unit}, "
        f"independently, takes part in one release (all {unit}s take part where it is absent). A "
        "*replay* repeats, after an interruption, the release of exactly the same sum with exactly "
        "the same noise, and reveals nothing new: the noise is derived from the sum, so any "
        "other sum would have had other noise and would have been charged. The full "
        "list is in `ledger.jsonl`."
    )


def stage_words(stage: StageFacts) -> str:
    """One stage in a line, for what has no table."""
    return (
        f"{stage.title}: {MECHANISMS.get(stage.mechanism, stage.mechanism)} mechanism, σ = "
        f"{stage.noise_multiplier:g}, C = {stage.bound:g} ({stage.contribution}), q = "
        f"{stage.sample_rate:.6g}, T = {stage.count:,}"
    )
