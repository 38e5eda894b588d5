"""Gathers the facts of a run's privacy card from its plan, ledger and configuration."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sapf_ray import __version__
from sapf_ray.config import RunConfig
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon, supports
from sapf_ray.privacy.card_facts import (
    MOST_VALUES,
    Budget,
    CardFacts,
    Claim,
    Person,
    Priced,
    Protected,
    Software,
    StageFacts,
    Unprotected,
    Use,
)
from sapf_ray.privacy.events import DpEvent, describe_event
from sapf_ray.privacy.fixed_point import grid_step
from sapf_ray.privacy.group_privacy import group_epsilon
from sapf_ray.privacy.ledger import Ledger, LedgerEvent
from sapf_ray.privacy.meaning import meaning
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan
from sapf_ray.privacy.release import sampler_delta
from sapf_ray.privacy.stage_plan import StagePlan
from sapf_ray.privacy.verdict import judge
from sapf_ray.stages import Stage

PERSON_IMAGES = (2, 5, 10)
PERSON_INTERVAL = 0.05
"""Widest discretisation where a person's epsilon is bounded: it costs 0.1 % there, and a tenth of
the time."""


def gather(
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
) -> CardFacts:
    """The facts of a run whose releases are over.

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
    events = ledger.events()
    charges = ledger.whole(Counter(entry.event for entry in events if not entry.replay))
    spent = ledger.epsilon_spent()
    verdict = judge(plan, ledger, reproducible=reproducible, spent=spent)
    private = not plan.non_private or not plan.reads_images
    relation = plan.neighbours
    stages = _stages(plan, config)
    return CardFacts(
        data=data_name,
        model=model_name,
        claim=Claim(kind=verdict.kind, release=verdict.release, text=verdict.markdown),
        private=private,
        reads_images=plan.reads_images,
        trains=plan.finetune is not None,
        protected=Protected(
            unit=relation.unit,
            n_units=plan.n_records,
            nominal=config.data.n_records is not None,
            adjacency=plan.adjacency,
            short=relation.short,
            neighbours=relation.sentence,
            groups=config.data.groups,
        ),
        budget=_budget(plan, charges, spent),
        batch_size=plan.batch_size,
        steps=plan.steps,
        meaning=meaning(charges.items(), plan.delta),
        persons=_persons(plan, charges, spent),
        stages=stages,
        repeat={} if plan.repeat is None else plan.repeat.to_dict(),
        uses=_uses(events),
        sampler_delta=_sampler_delta(stages, spent, private=private),
        remedies=plan.remedies,
        grounding=dict(grounding or {}),
        embedding=config.evolution.embedding if config.evolution.enabled else "",
        unprotected=Unprotected(
            evaluation=config.evaluation.enabled,
            scores=tuple(scores),
            diagnostics=tuple(diagnostics),
            skipped=dict(skipped or {}),
        ),
        seeded=reproducible,
        keeps_latents=config.cluster.keep_cache,
        shared_selection=shared_selection,
        software=Software(
            sapf_ray=__version__, dp_accounting=importlib.metadata.version("dp-accounting")
        ),
    )


def _budget(plan: PrivacyPlan, charges: Counter[DpEvent], spent: float) -> Budget:
    def priced(accountant: str, delta: float) -> Priced:
        epsilon = None
        if supports(accountant, charges.items()):
            epsilon = compose_epsilon(charges.items(), delta, accountant=accountant)
        title = ACCOUNTANTS[accountant].title
        return Priced(accountant=title, delta=delta, epsilon=epsilon)

    title = ACCOUNTANTS[plan.accountant].title
    others = [name for name in ACCOUNTANTS if name != plan.accountant]
    return Budget(
        planned=plan.epsilon,
        whole_plan=plan.composed_epsilon,
        spent=Priced(accountant=title, delta=plan.delta, epsilon=spent),
        others=tuple(priced(name, plan.delta) for name in others),
        strict=priced(plan.accountant, 1 / plan.n_records**2),
    )


def _persons(plan: PrivacyPlan, charges: Counter[DpEvent], spent: float) -> tuple[Person, ...]:
    """Empty for groups, where nothing was released, and where a mechanism is no Gaussian."""
    if plan.unit != "image" or not 0 < spent < math.inf:
        return ()
    interval = min(PERSON_INTERVAL, spent / 50)
    persons = []
    for k in PERSON_IMAGES:
        try:
            epsilon = group_epsilon(charges.items(), k, delta=plan.delta, interval=interval)
        except ValueError:
            return ()
        persons.append(Person(images=k, epsilon=epsilon))
    return tuple(persons)


def _stages(plan: PrivacyPlan, config: RunConfig) -> tuple[StageFacts, ...]:
    found = []
    for name, (title, contribution, bound) in _bounds(config, plan.unit).items():
        stage: StagePlan | None = getattr(plan, name)
        if stage is not None:
            found.append(
                StageFacts(
                    stage=name,
                    title=title,
                    contribution=contribution,
                    mechanism=stage.mechanism,
                    noise_multiplier=stage.noise_multiplier,
                    bound=bound,
                    sample_rate=stage.sample_rate,
                    count=stage.count,
                    share=stage.share,
                    grid=grid_step(bound),
                    slack=stage.slack,
                )
            )
    return tuple(found)


def _bounds(config: RunConfig, unit: str) -> dict[str, tuple[str, str, float]]:
    """Stage of the plan, in the run's order, to its name for people, what bounds one unit's
    contribution, and that bound.
    """
    each = f"{'an' if unit == 'image' else 'a'} {unit}"
    selection, finetune = config.saliency, config.finetune
    bounds = {
        Stage.VOTE: ("grounding, vote", f"one vote {each}", 1.0),
        Stage.HEAD: ("grounding, head", "features clipped", 1.0),
        Stage.PROPORTIONS: ("grounding, class proportions", f"one count {each}", 1.0),
        Stage.SELECTION: (
            "selection",
            f"{selection.clipping} clipping",
            selection.clipping_norm,
        ),
        Stage.FINETUNE: ("fine-tuning", f"{finetune.clipping} clipping", finetune.clipping_norm),
        Stage.EVOLUTION: ("evolution", f"one vote {each}", 1.0),
        Stage.SCORE: ("score of a private choice", f"one count {each}", 1.0),
    }
    return {name: bounds[name] for name in PRIVATE_STAGES}


def _uses(events: Sequence[LedgerEvent]) -> tuple[Use, ...]:
    """The ledger's lines, counted; in the order of their first appearance."""
    charged: Counter[tuple[str, DpEvent]] = Counter()
    replays: Counter[tuple[str, DpEvent]] = Counter()
    for entry in events:
        (replays if entry.replay else charged)[entry.stage, entry.event] += 1
    kinds = dict.fromkeys((entry.stage, entry.event) for entry in events)
    return tuple(
        Use(
            stage=stage,
            mechanism=describe_event(event),
            charged=charged[stage, event],
            replays=replays[stage, event],
        )
        for stage, event in kinds
    )


def _sampler_delta(stages: Sequence[StageFacts], spent: float, *, private: bool) -> float:
    """What the computed noise's cut tails and finite bits add to delta; 0 without noise."""
    if not private or not stages:
        return 0.0
    releases = sum(stage.count for stage in stages)
    return sampler_delta(MOST_VALUES, releases, epsilon=spent)
