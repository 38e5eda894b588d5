"""The privacy card: the guarantee of a run in words, for whoever decides on its release.

Example::

    text = privacy_card(plan, ledger, config, model_name="glyphs-tiny", data_name="digits")

References:
    1. Dwork, Roth. The algorithmic foundations of differential privacy. 2014.
    2. Ponomareva et al. How to DP-fy ML. JAIR 2023. (section 5.3: what to report)
    3. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
    4. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import epsilon_text
from sapf_ray.privacy.card_arithmetic import arithmetic
from sapf_ray.privacy.card_classes import classes_section
from sapf_ray.privacy.events import DpEvent, describe_event
from sapf_ray.privacy.ledger import Ledger, LedgerEvent
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.verdict import judge


def privacy_card(
    plan: PrivacyPlan,
    ledger: Ledger,
    config: RunConfig,
    *,
    model_name: str,
    data_name: str,
    scores: Sequence[str] = (),
    diagnostics: Sequence[str] = (),
    reproducible: bool | None = None,
    shared_selection: bool = False,
    skipped: Mapping[str, int] | None = None,
    grounding: Mapping[str, Any] | None = None,
) -> str:
    """Markdown text of the card.

    Args:
        plan: What was planned.
        ledger: What was spent.
        config: Says how sums were bounded, whether real images were read for scores, and where
            randomness came from.
        model_name: The public model.
        data_name: The sensitive data set.
        scores: Keys of the scores in ``metrics.json`` that were computed from real images.
        diagnostics: Names of further results that were computed from sensitive images without
            noise.
        reproducible: Whether noise came from a known seed; by default as ``config.privacy`` says.
        shared_selection: Whether other runs use this run's selection release, too.
        skipped: Number of records that could not be read, by split, where they are skipped.
        grounding: Content of ``grounding.json``, where remedies left one.
    """
    if reproducible is None:
        reproducible = config.privacy.is_seeded
    spent = ledger.epsilon_spent()
    private = not plan.non_private or not plan.reads_images
    sections = [
        f"# Privacy card\n\nSensitive data: **{data_name}** "
        f"({plan.n_records:,} training {plan.unit}s). Public model: **{model_name}**.",
        "> " + judge(plan, ledger, reproducible=reproducible, spent=spent).markdown,
        _guarantee(plan, spent, private=private),
        _numbers(plan, ledger, spent=spent),
        _events(ledger.events(), plan.unit),
        classes_section(plan, grounding or {}),
        arithmetic(plan, config, spent=spent),
        _public(config),
        _not_private(config, scores=scores, diagnostics=diagnostics),
        _randomness(config, reproducible=reproducible),
        _skipped(skipped or {}, plan),
        _limits(shared_selection),
    ]
    sections = [section for section in sections if section]
    return "\n\n".join(sections) + "\n"


def _skipped(skipped: Mapping[str, int], plan: PrivacyPlan) -> str:
    if not skipped:
        return ""
    counts = ", ".join(f"{n:,} of the {split} split" for split, n in skipped.items())
    return (
        f"## Records that could not be read\n\nSkipped (`data.on_error: skip`): {counts}. Such a "
        "record contributes nothing to any sum, so adding or removing it changes nothing, and "
        f"N = {plan.n_records:,} is the number listed, damaged records among them. The counts are "
        "exact and depend on the data: ε does not cover them. Delete this section before the card "
        "is published if they must stay secret."
    )


def _guarantee(plan: PrivacyPlan, spent: float, *, private: bool) -> str:
    text = "## What the guarantee means\n\n"
    if not private:
        return text + "There is none: ε is infinite."
    if not plan.reads_images:
        return (
            f"{text}The synthetic images do not depend on the sensitive data set, so they reveal "
            "nothing about it."
        )
    made = "synthetic images"
    if plan.finetune is not None:
        made = "adapter, all its earlier states, the synthetic images"
    of_whom = "image, with its label"
    limit = (
        "The guarantee is for one *image*: for a person with k images reckon with kε and a larger "
        "δ, or plan with `data.groups`."
    )
    if plan.unit == "group":
        of_whom = "group, with all its images and their labels"
        limit = (
            "The guarantee is for one *group* as `data.groups` says whose an image is: a person in "
            "two groups, or in another's images, has less."
        )
    factor = math.exp(spent) if spent < 700 else math.inf
    return (
        f"{text}Taking any one {of_whom}, out of the training images, or adding one, "
        f"makes no outcome of this run more than e^ε = {factor:,.4g} times as likely as before, "
        f"except with a probability of δ = {plan.delta:.3g}; this bounds what anyone, whatever "
        f"else they know, can learn about one {plan.unit}'s presence or content. {limit} It covers "
        f"the {made} and all that is computed from them. The smaller ε, the stronger: ε of 1 or "
        "less is commonly called strong, while from about 10 on the bound by itself promises "
        "little."
    )


def _numbers(plan: PrivacyPlan, ledger: Ledger, *, spent: float) -> str:
    def number(value: float) -> str:
        return "infinite" if math.isinf(value) else f"{value:.4f}"

    rows = [
        (
            "Planned ε (upper limit)",
            "none, not private" if plan.non_private else f"{plan.epsilon:g}",
        ),
        ("ε of the whole plan", number(plan.composed_epsilon)),
        ("ε spent", f"{number(spent)} ({ACCOUNTANTS[plan.accountant].title} accountant)"),
        *_other_epsilons(plan, ledger),
        ("δ", f"{plan.delta:.4g} ({plan.delta * plan.n_records:.2g} / N)"),
        ("Neighbouring data sets", f"one {plan.unit} added or removed"),
        (f"{plan.unit.title()}s, N", f"{plan.n_records:,}"),
    ]
    if plan.finetune is not None:
        rows.append(("Expected batch size, steps", f"{plan.batch_size:,}, {plan.steps:,}"))
    if plan.evolution is not None:
        each = "an image" if plan.unit == "image" else "a group"
        rows.append((f"Noisy histograms, one vote {each}", f"{plan.evolution.count:,}"))
    return "## Numbers\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows
    )


def _other_epsilons(plan: PrivacyPlan, ledger: Ledger) -> list[tuple[str, str]]:
    """What the accountants that the plan does not use say of the same events."""
    charged = Counter(entry.event for entry in ledger.events() if not entry.replay)
    rows = []
    for name, row in ACCOUNTANTS.items():
        if name != plan.accountant:
            text = epsilon_text(charged.items(), plan.delta, accountant=name)
            rows.append(
                (f"ε spent, by the {row.title} accountant", text.replace("inf", "infinite"))
            )
    return rows


def _events(events: list[LedgerEvent], unit: str) -> str:
    text = "## Every use of the sensitive images\n\n"
    if not events:
        return text + "None."
    charged: Counter[tuple[str, DpEvent]] = Counter()
    replays: Counter[tuple[str, DpEvent]] = Counter()
    for e in events:
        (replays if e.replay else charged)[e.stage, e.event] += 1
    lines = []
    for stage, event in dict.fromkeys((e.stage, e.event) for e in events):
        counts = f"{charged[stage, event]:,} | {replays[stage, event]:,}"
        lines.append(f"| {stage} | {describe_event(event)} | {counts} |")
    return (
        f"{text}| stage | mechanism | charged | replays |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n*Noise* is the standard deviation of the Gaussian noise over the most that one "
        f"{unit} can contribute; *Poisson sample* is the probability with which each {unit}, "
        f"independently, takes part in one release (all {unit}s take part where it is absent). A "
        "*replay* repeats, after an interruption, the release of exactly the same sum with exactly "
        "the same noise, and reveals nothing new: the noise is derived from the sum, so any "
        "other sum would have had other noise and would have been charged. The full "
        "list is in `ledger.jsonl`."
    )


def _public(config: RunConfig) -> str:
    networks = "the public model and its weights"
    units = "images, N" if config.data.groups is None else "groups, N, and of images"
    if config.evolution.enabled:
        networks += (
            f", and those of the network that compares images ({config.evolution.embedding})"
        )
    return (
        "## Assumed to be public\n\n"
        f"- the number of training {units}, which the sample rate and δ are made from;\n"
        "- the names of the classes and the prompts made from them, and that synthetic classes are "
        "equally frequent;\n"
        f"- the image size, {networks}, which must not have been trained on these images;\n"
        "- every value of the configuration. Hyper-parameters chosen by looking at the sensitive "
        "images would cost further privacy, which this card does not count."
    )


def _not_private(config: RunConfig, *, scores: Sequence[str], diagnostics: Sequence[str]) -> str:
    items = ["evaluation against real images: no"]
    if config.evaluation.enabled:
        names = ", ".join(f"`{name}`" for name in scores) or "FID, accuracy, conditional fidelity"
        items = [
            f"evaluation ({names}) against real test and training images: yes. Those scores are "
            "measurements of a research run; they are not covered by ε and should not be released "
            "with the images"
        ]
    items += diagnostics
    lines = "\n".join(f"- {item};" for item in items)
    return f"## Computed without protection\n\n{lines[:-1]}."


def _randomness(config: RunConfig, *, reproducible: bool) -> str:
    text = "## Source of randomness\n\n"
    if reproducible:
        return (
            f"{text}A **reproducible seed** from the configuration, for tests and research. "
            "**NOT FOR RELEASE**: repeat the run without `privacy.reproducible_seed`."
        )
    kept = ""
    if config.cluster.keep_cache:
        kept = (
            " The run's other private files, latents of the sensitive images among them, are kept "
            "(`cluster.keep_cache`)."
        )
    return (
        f"{text}A 256-bit secret from the operating system's cryptographic generator, deleted "
        "after the last release: whoever had it could remove the noise, and knew which images took "
        f"part in each step.{kept}"
    )


def _limits(shared_selection: bool) -> str:
    shared = ""
    if shared_selection:
        shared = (
            " The selection here is one release that other runs use as well: it is whole in the ε "
            "of each, and once in the ε of all of them together."
        )
    return (
        "## Known limits\n\n"
        "- With pseudo-random noise the guarantee holds against attackers who cannot break the "
        "generator.\n"
        "- The guarantee is about what the run releases. How long its steps take, and error "
        "messages about images that cannot be read, are not covered.\n"
        "- Other disclosures about the same images, by other runs or other publications, add to "
        f"this ε. Several runs over the same images add up.{shared}"
    )
