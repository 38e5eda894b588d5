"""The privacy plan: every number of the guarantee, fixed before the first sensitive image is read.

Given epsilon, delta, N, batch size, steps and the selection's noise, :func:`make_plan` finds the
smallest fine-tuning noise multiplier (rounded up to 4 significant digits) with which selection and
fine-tuning together stay within epsilon (paper, section 3.4), or the smallest noise of an
evolution's histograms. It touches no data: N is public by convention.

Example::

    plan = make_plan(RunConfig(privacy=PrivacyConfig(epsilon=10.0, accountant="rdp"),
                               saliency=SaliencyConfig(noise_multiplier=5.0)), n_records=45_000)
    plan.finetune.noise_multiplier     # 1.796 with the default 1000 steps of 4096 images
    json.dumps(plan.to_dict())         # what `sapf plan --json` prints

References:
    1. Abadi et al. Deep learning with differential privacy. CCS 2016.
    2. Gopi, Lee, Wutschitz. Numerical composition of differential privacy. NeurIPS 2021.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.config.section import require
from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import stage_shares, supports
from sapf_ray.privacy.adjacency import ADJACENCIES, ZERO_OUT_ONE, Adjacency, adjacency_name
from sapf_ray.privacy.calibration import (
    MAX_NOISE_MULTIPLIER,
    Budget,
    Charges,
    root,
    smallest_decimal,
    smallest_noise,
)
from sapf_ray.privacy.choice import choose, grounding_stages
from sapf_ray.privacy.events import DpEvent, describe_event, gaussian_event
from sapf_ray.privacy.facts import Facts, default_delta
from sapf_ray.privacy.private_choice import planned_repeat, score_stage
from sapf_ray.privacy.repeat import Repeat
from sapf_ray.privacy.stage_plan import StagePlan
from sapf_ray.registry import row
from sapf_ray.stages import Stage

GROUNDING_STAGES = (Stage.VOTE, Stage.HEAD, Stage.PROPORTIONS)
PRIVATE_STAGES = (*GROUNDING_STAGES, Stage.SELECTION, Stage.FINETUNE, Stage.EVOLUTION, Stage.SCORE)
GHOST_SLACK = 2.0**-9
"""Slack of fine-tuning whole matrices: see :mod:`sapf_ray.grad_sample.ghost`."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """All public numbers of the guarantee.

    ``selection`` is None when no selection is released: with ratio 1 every matrix is kept, whatever
    the data, and a random selection does not look at them.
    ``remedies`` are those of :mod:`sapf_ray.grounding`; ``vote``, ``head`` and ``proportions``
    are None unless they are among them and release something.
    Selection and fine-tuning are None when steps is 0. Then ``batch_size`` and
    ``sample_rate`` are 0, and either the images come from an ``evolution``, or remedies ground
    the public model, or no sensitive image is read and ``composed_epsilon`` is 0.
    ``repeat`` is there where this run is one trial of a private choice: ``score`` is then what its
    score releases, ``composed_epsilon`` that of all trials, and ``n_records`` leaves out the
    records that are held out for the scores.
    ``canaries`` virtual records and crafted images join a run that is audited and never released.
    """

    epsilon: float
    delta: float
    accountant: str
    n_records: int
    batch_size: int
    sample_rate: float
    steps: int
    selection: StagePlan | None
    finetune: StagePlan | None
    composed_epsilon: float
    non_private: bool = False
    adjacency: str = ZERO_OUT_ONE
    evolution: StagePlan | None = None
    remedies: tuple[str, ...] = ()
    vote: StagePlan | None = None
    head: StagePlan | None = None
    proportions: StagePlan | None = None
    canaries: int = 0
    score: StagePlan | None = None
    repeat: Repeat | None = None

    @property
    def unit(self) -> str:
        """Whom the guarantee is for: one ``image``, or one ``group`` of them."""
        return self.neighbours.unit

    @property
    def neighbours(self) -> Adjacency:
        """Which data sets the guarantee compares."""
        return ADJACENCIES[self.adjacency]

    @property
    def reads_images(self) -> bool:
        """Whether any sensitive image is read."""
        return any(getattr(self, name) is not None for name in PRIVATE_STAGES)

    @property
    def encodes(self) -> bool:
        """Whether the latents of the images are needed."""
        grounds = any(getattr(self, name) is not None for name in GROUNDING_STAGES)
        return grounds or self.finetune is not None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``sapf plan --json``. JSON has no infinity: a non-private run's
        ``composed_epsilon`` is the string ``"inf"``, which ``float()`` reads back."""
        data = dataclasses.asdict(self)
        if math.isinf(self.composed_epsilon):
            data["composed_epsilon"] = "inf"
        if self.canaries == 0:  # so that a run of an earlier version has the same plan
            del data["canaries"]
        if self.repeat is None:
            del data["repeat"], data["score"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrivacyPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: Missing or unknown keys.
        """
        try:
            fields = dict(data)
            for stage in (*GROUNDING_STAGES, Stage.EVOLUTION, Stage.SCORE):
                fields.setdefault(stage, None)  # plans of before these stages lack them
            fields["remedies"] = tuple(fields.get("remedies", ()))
            for stage in PRIVATE_STAGES:
                fields[stage] = None if fields[stage] is None else StagePlan(**fields[stage])
            if fields.get("repeat") is not None:
                fields["repeat"] = Repeat.from_dict(fields["repeat"])
            fields["composed_epsilon"] = float(fields["composed_epsilon"])
            _ = ADJACENCIES[fields["adjacency"]]
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a privacy plan: {error}") from error


def make_plan(config: RunConfig, n_records: int, *, facts: Facts | None = None) -> PrivacyPlan:
    """Plans a run over ``n_records`` images, or groups of them.

    Args:
        config: The whole experiment.
        n_records: Number of units of privacy that there are: N, unless ``data.n_records`` gives
            a nominal one.
        facts: What else is public of the data; where it is not known, no remedy is chosen for the
            user.

    Raises:
        ConfigError: The batch exceeds N, epsilon cannot be met, or the accountant cannot price what
            is planned; names the field to change.
    """
    privacy = config.privacy
    n_records = config.data.n_records or n_records
    repeat = planned_repeat(config, n_records)
    of_all = n_records
    n_records -= 0 if repeat is None else repeat.held_out
    _check_size(config, n_records)
    delta = default_delta(of_all) if privacy.delta is None else privacy.delta
    require(
        delta < 1 / of_all or privacy.allow_large_delta,
        "privacy.delta",
        delta,
        f"must be below 1 / N = {1 / of_all:.3g}: publishing one image as it is satisfies a "
        "larger one (privacy.allow_large_delta lets it pass)",
    )
    budget = Budget(
        epsilon=privacy.epsilon, delta=delta, accountant=privacy.accountant, repeat=repeat
    )
    steps = config.finetune.steps
    batch_size = config.finetune.batch_size if steps > 0 else 0
    if facts is not None:
        facts = dataclasses.replace(facts, n_records=n_records)
    remedies = choose(config, facts, budget=budget)
    before = grounding_stages(
        config, facts or Facts(n_records=n_records), remedies=remedies, budget=budget
    )
    if repeat is not None:
        before[Stage.SCORE] = score_stage(budget, config.tuning.score_share)
    stages = _stages(config, budget, sample_rate=batch_size / n_records, before=before)
    charges = tuple(charge for stage in stages.values() for charge in stage.charges())
    shares = stage_shares({name: stage.charges() for name, stage in stages.items()}, delta)
    if shares is not None:
        stages = {
            name: dataclasses.replace(stage, share=shares[name]) for name, stage in stages.items()
        }
    return PrivacyPlan(
        epsilon=privacy.epsilon,
        delta=delta,
        accountant=privacy.accountant,
        n_records=n_records,
        batch_size=batch_size,
        sample_rate=batch_size / n_records,
        steps=steps,
        selection=stages.get(Stage.SELECTION),
        finetune=stages.get(Stage.FINETUNE),
        composed_epsilon=budget.spent(charges),
        non_private=privacy.non_private,
        adjacency=adjacency_name(
            nominal=config.data.n_records is not None, groups=config.data.groups is not None
        ),
        evolution=stages.get(Stage.EVOLUTION),
        remedies=remedies,
        vote=stages.get(Stage.VOTE),
        head=stages.get(Stage.HEAD),
        proportions=stages.get(Stage.PROPORTIONS),
        canaries=config.audit.canaries + config.audit.images,
        score=stages.get(Stage.SCORE),
        repeat=repeat,
    )


def evolution_stage(
    epsilon: float, delta: float, *, iterations: int, accountant: str, non_private: bool = False
) -> StagePlan:
    """An evolution's noisy histograms: each on the full pass, of L2 sensitivity 1.

    Their composition costs what one Gaussian release with noise ``sigma / sqrt(iterations)`` costs
    (Lin et al., Private Evolution, ICLR 2024).

    Args:
        epsilon: What the histograms may spend, above 0.
        delta: In (0, 1).
        iterations: Number of histograms, at least 1.
        accountant: A row of :data:`sapf_ray.privacy.accountant_table.ACCOUNTANTS`.
        non_private: No noise at all; epsilon is then infinite.

    Raises:
        ConfigError: No noise multiplier keeps them within epsilon.
    """
    stage = StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=iterations, share=None)
    if non_private:
        return stage
    budget = Budget(epsilon=epsilon, delta=delta, accountant=accountant)
    noise = smallest_noise(stage, budget)
    if noise is None:
        raise _out_of_reach(
            budget,
            stage.charges(MAX_NOISE_MULTIPLIER),
            what=f"{iterations} histograms",
            advice="raise privacy.epsilon or lower evolution.iterations",
        )
    return dataclasses.replace(stage, noise_multiplier=noise, share=1.0)


def plan_events(plan: PrivacyPlan) -> list[tuple[str, DpEvent, int]]:
    """(stage, event of one release, number of releases) of all the plan allows."""
    stages = [(name, getattr(plan, name)) for name in PRIVATE_STAGES]
    return [(name, stage.event(), stage.count) for name, stage in stages if stage is not None]


def _check_size(config: RunConfig, n_records: int) -> None:
    if n_records < 3:
        raise ConfigError("data.n_records", n_records, "must be at least 3")
    finetune = config.finetune
    what = "records" if config.data.groups is None else "groups"
    if finetune.steps > 0 and finetune.batch_size > n_records:
        raise ConfigError(
            "finetune.batch_size",
            finetune.batch_size,
            f"must be at most the number of training {what}, {n_records}; `sapf init` writes a "
            "config that fits the images",
        )


def _stages(
    config: RunConfig, budget: Budget, *, sample_rate: float, before: Mapping[str, StagePlan]
) -> dict[str, StagePlan]:
    """The stages that read sensitive images, with their noise; that of ``before`` is fixed."""
    non_private = config.privacy.non_private
    if config.evolution.enabled:
        _check_supported(budget, gaussian_event(1.0))
        evolution = evolution_stage(
            budget.epsilon,
            budget.delta,
            iterations=config.evolution.iterations,
            accountant=budget.accountant,
            non_private=non_private,
        )
        return {Stage.EVOLUTION: evolution}
    if config.finetune.steps == 0:
        return dict(before)
    stages = dict(before)
    score = row("saliency.score", config.saliency.score)
    if config.saliency.ratio < 1 and score.data_free is None:
        releases = config.saliency.rounds if score.iterative else 1
        stages[Stage.SELECTION] = _selection_stage(config, budget.delta, releases=releases)
    finetune = StagePlan(
        noise_multiplier=0.0,
        sample_rate=sample_rate,
        count=config.finetune.steps,
        share=None,
        slack=0.0 if config.finetune.adapter == "lora" else GHOST_SLACK,
    )
    if not non_private:
        fixed = tuple(charge for stage in stages.values() for charge in stage.charges())
        _check_supported(budget, *(event for event, _ in fixed), gaussian_event(1.0, sample_rate))
        for name, stage in stages.items():
            _check_fits(name, stage, budget=budget)
        noise = smallest_noise(finetune, budget, before=fixed)
        if noise is None:
            raise _out_of_reach(
                budget,
                (*fixed, *finetune.charges(MAX_NOISE_MULTIPLIER)),
                what=f"{finetune.count} steps",
                advice="raise privacy.epsilon or saliency.noise_multiplier",
            )
        finetune = dataclasses.replace(finetune, noise_multiplier=noise)
    stages[Stage.FINETUNE] = finetune
    return stages


def _selection_stage(config: RunConfig, delta: float, *, releases: int) -> StagePlan:
    """The selection: one release, or as many as an iterative score takes."""
    saliency = config.saliency
    tested = saliency.mechanism == "propose_test_release"
    return StagePlan(
        noise_multiplier=0.0 if config.privacy.non_private else saliency.noise_multiplier,
        sample_rate=saliency.sample_rate,
        count=releases,
        share=None,
        mechanism=saliency.mechanism,
        delta=saliency.delta_share * delta if tested else 0.0,
    )


def _check_supported(budget: Budget, *events: DpEvent) -> None:
    for event in events:
        if not supports(budget.accountant, event):
            able = [name for name in ACCOUNTANTS if supports(name, event)]
            raise ConfigError(
                "privacy.accountant",
                budget.accountant,
                f"cannot price {describe_event(event)}; {' or '.join(able) or 'none'} can",
            )


NOISE_FIELDS: Mapping[str, str] = {
    **{name: f"grounding.{name}_noise_multiplier" for name in GROUNDING_STAGES},
    Stage.SELECTION: "saliency.noise_multiplier",
}
"""Stage whose noise is given to the key that gives it."""


def _check_fits(name: str, stage: StagePlan, *, budget: Budget) -> None:
    spent = budget.spent(stage.charges())
    if spent < budget.epsilon:
        return

    def doubled(noise: float) -> float:
        return 2 * budget.spent(stage.charges(noise)) / budget.epsilon

    guess = root(doubled, 4 / budget.epsilon)
    fits = None
    if guess is not None:
        fits = smallest_decimal(lambda noise: doubled(noise) <= 1, guess)
    advice = f"; from {fits:g} on it takes at most half" if fits is not None else ""
    raise ConfigError(
        NOISE_FIELDS[name],
        stage.noise_multiplier,
        f"the {name} alone spends epsilon = {spent:.3f} of the planned {budget.epsilon:g}{advice}",
    )


def _out_of_reach(budget: Budget, charges: Charges, *, what: str, advice: str) -> ConfigError:
    """Why no noise is enough.

    Args:
        budget: What may be spent.
        charges: All releases with the most noise there is.
        what: Of which releases the budget is exceeded.
        advice: What to change.
    """
    if math.isinf(budget.spent(charges)):
        return ConfigError(
            "privacy.delta",
            budget.delta,
            f"is smaller than what {ACCOUNTANTS[budget.accountant].title} accounting resolves "
            "here: no noise gives a finite epsilon; take a larger one, or privacy.accountant rdp",
        )
    return ConfigError(
        "privacy.epsilon",
        budget.epsilon,
        f"cannot be met by {what} at any noise multiplier up to {MAX_NOISE_MULTIPLIER:g}; {advice}",
    )
