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
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from scipy.optimize import brentq

from sapf_ray.config import DATA_FREE_SCORES, ITERATIVE_SCORES, RunConfig, SaliencyConfig
from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountants import (
    PLD_INTERVAL,
    DpEvent,
    approximate_event,
    compose_epsilon,
    exponential_event,
    gaussian_event,
    stage_shares,
)

ADD_OR_REMOVE_ONE = "add_or_remove_one"
STAGES = ("selection", "finetune", "evolution")
MAX_NOISE_MULTIPLIER = 1e5
_MIN_NOISE_MULTIPLIER = 1e-2


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """``count`` releases of one kind.

    Args:
        noise_multiplier: Noise std over the clipping norm; 0 in non-private runs. Of an exponential
            selection: of the Gaussian release that costs as much; of propose-test-release: scale of
                the Laplace noise, 1 / its epsilon.
        sample_rate: Poisson rate of each release; 1 reads all records.
        count: Number of releases.
        share: Fraction of the total RDP at the optimal order (paper, section 3.4); None in
            non-private runs.
        mechanism: ``gaussian``, or another of :mod:`sapf_ray.saliency.mechanisms`.
        delta: Spent by propose-test-release alone, beside its epsilon.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    share: float | None
    mechanism: str = "gaussian"
    delta: float = 0.0

    def event(self) -> DpEvent:
        """The event of one of the releases."""
        if self.mechanism == "exponential":
            return exponential_event(self.noise_multiplier)
        if self.mechanism == "propose_test_release":
            return approximate_event(
                1 / self.noise_multiplier if self.noise_multiplier else math.inf, self.delta
            )
        return gaussian_event(self.noise_multiplier, self.sample_rate)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """All public numbers of the guarantee.

    ``selection`` is None when no selection is released: with ratio 1 every matrix is kept, whatever
    the data, and a random selection does not look at them.
    Both are None when steps is 0. Then ``batch_size`` and ``sample_rate`` are 0, and either the
    images come from an ``evolution`` or no sensitive image is read and ``composed_epsilon`` is 0.
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
    adjacency: str = ADD_OR_REMOVE_ONE
    evolution: StagePlan | None = None

    @property
    def reads_images(self) -> bool:
        """Whether any sensitive image is read."""
        return any(getattr(self, name) is not None for name in STAGES)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``sapf plan --json``. JSON has no infinity: a non-private run's
        ``composed_epsilon`` is the string ``"inf"``, which ``float()`` reads back."""
        data = dataclasses.asdict(self)
        if math.isinf(self.composed_epsilon):
            data["composed_epsilon"] = "inf"
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrivacyPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: Missing or unknown keys.
        """
        try:
            fields = dict(data)
            fields.setdefault("evolution", None)  # plans of before Private Evolution lack it
            for stage in STAGES:
                fields[stage] = None if fields[stage] is None else StagePlan(**fields[stage])
            fields["composed_epsilon"] = float(fields["composed_epsilon"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a privacy plan: {error}") from error


def default_delta(n_records: int) -> float:
    """1 / (N ln N), as the paper."""
    return 1 / (n_records * math.log(n_records))


def make_plan(config: RunConfig, n_records: int) -> PrivacyPlan:
    """Plans a run over ``n_records`` images.

    Raises:
        ConfigError: The batch exceeds N, or epsilon cannot be met; names the field to change.
    """
    privacy, finetune = config.privacy, config.finetune
    if n_records < 3:
        raise ConfigError("data.n_records", n_records, "must be at least 3")
    if finetune.steps > 0 and finetune.batch_size > n_records:
        raise ConfigError(
            "finetune.batch_size",
            finetune.batch_size,
            f"must be at most the number of training records, {n_records}",
        )
    delta = default_delta(n_records) if privacy.delta is None else privacy.delta
    batch_size = finetune.batch_size if finetune.steps > 0 else 0
    rate = batch_size / n_records
    selects = (
        finetune.steps > 0
        and config.saliency.ratio < 1
        and config.saliency.score not in DATA_FREE_SCORES
    )
    planned = (
        {"selection": _selection_stage(config.saliency, delta, non_private=privacy.non_private)}
        if selects
        else {}
    )
    noise: float | None = None
    evolution = None
    if config.evolution.enabled:
        evolution, composed = _evolution_stage(config, delta)
    elif finetune.steps == 0:
        composed = 0.0
    elif privacy.non_private:
        noise, composed = 0.0, math.inf
    else:
        before: tuple[tuple[DpEvent, int], ...] = ()
        if selects:
            before = ((planned["selection"].event(), planned["selection"].count),)
            _check_selection_fits(config, delta)
        noise = smallest_noise(
            before, rate, finetune.steps, privacy.epsilon, delta, privacy.accountant
        )
        if noise is None:
            raise ConfigError(
                "privacy.epsilon",
                privacy.epsilon,
                f"cannot be met by {finetune.steps} steps at any noise multiplier up to {MAX_NOISE_MULTIPLIER:g}; "
                f"raise privacy.epsilon or saliency.noise_multiplier",
            )
        composed = _epsilon(before, noise, rate, finetune.steps, delta, privacy.accountant)
    if noise is not None:
        planned["finetune"] = StagePlan(
            noise_multiplier=noise, sample_rate=rate, count=finetune.steps, share=None
        )
    shares = stage_shares(
        {name: [(stage.event(), stage.count)] for name, stage in planned.items()}, delta
    )
    if shares is not None:
        planned = {
            name: dataclasses.replace(stage, share=shares[name]) for name, stage in planned.items()
        }
    return PrivacyPlan(
        epsilon=privacy.epsilon,
        delta=delta,
        accountant=privacy.accountant,
        n_records=n_records,
        batch_size=batch_size,
        sample_rate=rate,
        steps=finetune.steps,
        selection=planned.get("selection"),
        finetune=planned.get("finetune"),
        composed_epsilon=composed,
        non_private=privacy.non_private,
        evolution=evolution,
    )


def evolution_stage(
    epsilon: float, delta: float, *, iterations: int, accountant: str, non_private: bool = False
) -> StagePlan:
    """An evolution's noisy histograms: each on the full pass, of L2 sensitivity 1.

    Their composition costs what one Gaussian release with noise ``sigma / sqrt(iterations)`` costs
    (Lin et al., Private Evolution, ICLR 2024).

    Args:
        iterations: Histograms, at least 1.
        non_private: No noise at all; epsilon is then infinite.

    Raises:
        ConfigError: No noise multiplier keeps them within epsilon.
    """
    noise = 0.0 if non_private else smallest_noise((), 1.0, iterations, epsilon, delta, accountant)
    if noise is None:
        raise ConfigError(
            "privacy.epsilon",
            epsilon,
            f"cannot be met by {iterations} histograms at any noise multiplier up to {MAX_NOISE_MULTIPLIER:g}; "
            "raise privacy.epsilon or lower evolution.iterations",
        )
    return StagePlan(
        noise_multiplier=noise,
        sample_rate=1.0,
        count=iterations,
        share=None if non_private else 1.0,
    )


def _evolution_stage(config: RunConfig, delta: float) -> tuple[StagePlan, float]:
    """The stage and what it composes to."""
    privacy = config.privacy
    stage = evolution_stage(
        privacy.epsilon,
        delta,
        iterations=config.evolution.iterations,
        accountant=privacy.accountant,
        non_private=privacy.non_private,
    )
    if privacy.non_private:
        return stage, math.inf
    return stage, _epsilon(
        (), stage.noise_multiplier, stage.sample_rate, stage.count, delta, privacy.accountant
    )


def plan_events(plan: PrivacyPlan) -> list[tuple[str, DpEvent, int]]:
    """(stage, event of one release, number of releases) of all the plan allows."""
    stages = [(name, getattr(plan, name)) for name in STAGES]
    return [(name, stage.event(), stage.count) for name, stage in stages if stage is not None]


def plan_table(plan: PrivacyPlan) -> Table:
    """The plan for people, as printed by ``sapf plan``."""
    spent = (
        "infinite, NOT PRIVATE"
        if plan.non_private and plan.reads_images
        else f"{plan.composed_epsilon:.4f}"
    )
    batch = f"; expected batch size {plan.batch_size:,}" if plan.finetune is not None else ""
    table = Table(
        title=f"Privacy plan: ε = {plan.epsilon:g} at δ = {plan.delta:.3g}, add/remove one of {plan.n_records:,} images",
        caption=f"composes to ε = {spent} ({plan.accountant.upper()}){batch}",
    )
    table.add_column("stage")
    for name in ("releases", "sample rate", "noise multiplier", "share of the budget"):
        table.add_column(name, justify="right")
    rows = [("selection", plan.selection), ("fine-tuning", plan.finetune)]
    for name, stage in rows if plan.evolution is None else [("evolution", plan.evolution)]:
        if stage is None:
            why = (
                "reads no sensitive image"
                if plan.steps == 0
                else "no release: the choice reads no sensitive image"
            )
            table.add_row(name, "0", "-", "-", why)
        else:
            share = "-" if stage.share is None else f"{stage.share:.2%}"
            table.add_row(
                name,
                f"{stage.count:,}",
                f"{stage.sample_rate:.6g}",
                f"{stage.noise_multiplier:.4g}",
                share,
            )
    return table


def _selection_stage(
    saliency: SaliencyConfig, delta: float, *, non_private: bool = False
) -> StagePlan:
    """The selection's releases: one, or as many as an iterative score takes."""
    tested = saliency.mechanism == "propose_test_release"
    return StagePlan(
        noise_multiplier=0.0 if non_private else saliency.noise_multiplier,
        sample_rate=saliency.sample_rate,
        count=saliency.rounds if saliency.score in ITERATIVE_SCORES else 1,
        share=None,
        mechanism=saliency.mechanism,
        delta=saliency.delta_share * delta if tested else 0.0,
    )


def _check_selection_fits(config: RunConfig, delta: float) -> None:
    privacy, saliency = config.privacy, config.saliency

    def spends(noise: float) -> float:
        stage = _selection_stage(dataclasses.replace(saliency, noise_multiplier=noise), delta)
        return compose_epsilon([(stage.event(), stage.count)], delta, accountant=privacy.accountant)

    spent = spends(saliency.noise_multiplier)
    if spent < privacy.epsilon:
        return
    guess = _root(lambda noise: 2 * spends(noise) / privacy.epsilon, 4 / privacy.epsilon)
    fits = (
        None
        if guess is None
        else _smallest_on_grid(lambda noise: 2 * spends(noise) <= privacy.epsilon, guess)
    )
    advice = f"; from {fits:g} on it takes at most half" if fits is not None else ""
    raise ConfigError(
        "saliency.noise_multiplier",
        saliency.noise_multiplier,
        f"the selection alone spends epsilon = {spent:.3f} of the planned {privacy.epsilon:g}{advice}",
    )


def _epsilon(
    before: tuple[tuple[DpEvent, int], ...],
    noise: float,
    rate: float,
    count: int,
    delta: float,
    accountant: str,
    pld_interval: float = PLD_INTERVAL,
) -> float:
    return compose_epsilon(
        [*before, (gaussian_event(noise, rate), count)],
        delta,
        accountant=accountant,
        pld_interval=pld_interval,
    )


@functools.lru_cache(maxsize=256)
def smallest_noise(
    before: tuple[tuple[DpEvent, int], ...],
    rate: float,
    count: int,
    epsilon: float,
    delta: float,
    accountant: str,
) -> float | None:
    """The smallest 4-digit noise multiplier of ``count`` releases after ``before``; None when there
    is none.

    A root of a coarser discretisation (a tenth of the cost at epsilon 10) tells where to look; only
    the fine one decides.
    """
    coarse = PLD_INTERVAL * min(max(epsilon, 1.0), 10.0)
    fine = functools.partial(
        _epsilon, before, rate=rate, count=count, delta=delta, accountant=accountant
    )
    guess = _root(
        lambda noise: fine(noise, pld_interval=coarse) / epsilon,
        rate * math.sqrt(24 * count) / epsilon,
    )
    if guess is None:
        return None
    return _smallest_on_grid(lambda noise: fine(noise) <= epsilon, guess)


def _root(ratio: Callable[[float], float], start: float) -> float | None:
    """A noise multiplier near which ``ratio``, decreasing in it, passes 1; None when it stays above
    1.
    """
    high = min(max(start, 0.5), MAX_NOISE_MULTIPLIER)
    while ratio(high) > 1:
        if high >= MAX_NOISE_MULTIPLIER:
            return None
        high = min(high * 2, MAX_NOISE_MULTIPLIER)
    low = high
    while ratio(low) <= 1:
        high = low
        if low <= _MIN_NOISE_MULTIPLIER:
            return low
        low /= 1.5
    return math.exp(
        brentq(
            lambda x: math.log(min(max(ratio(math.exp(x)), 1e-9), 1e9)),
            math.log(low),
            math.log(high),
            xtol=1e-4,
            rtol=1e-4,
        )
    )


def _grid_index(value: float) -> int:
    """Number of the smallest 4-digit decimal that is not below ``value``."""
    exponent = math.floor(math.log10(value))
    digits = math.ceil(round(value / 10.0 ** (exponent - 3), 6))
    return exponent * 9000 + digits - 1000


def _grid_value(index: int) -> float:
    exponent, digits = divmod(index, 9000)
    return float(f"{digits + 1000}e{exponent - 3}")


def _smallest_on_grid(fits: Callable[[float], bool], guess: float) -> float | None:
    """Gallops from ``guess`` to both sides of the boundary, then bisects."""
    high = _grid_index(guess)
    step = 1
    low = None
    while not fits(_grid_value(high)):
        low, high, step = high, high + step, step * 2
        if _grid_value(high) > MAX_NOISE_MULTIPLIER:
            return None
    if low is None:
        low, step = high - 1, 1
        while fits(_grid_value(low)) and _grid_value(low) > _MIN_NOISE_MULTIPLIER:
            high, low, step = low, low - step * 2, step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(_grid_value(middle)) else (middle, high)
    return _grid_value(high)
