"""The white-box audit: canaries' scores from a run's own releases.

Bounds on epsilon first. Then parts of the same claim, each by the test that sees most: whether the
noise is as large as planned, whether a clipped canary moves a sum by no more than the sensitivity,
whether samples are Poisson, whether the ledger has every release. These tests are at a level of
one in a million, so that honest runs pass.

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Mahloujifar, Melis, Chaudhuri. Auditing f-differential privacy in one run. 2024.
    3. Chua et al. How private are DP-SGD implementations? ICML 2024. (shuffling is not Poisson)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, norm

from sapf_ray.audit.auditor import CanaryScoreAuditor, Estimate
from sapf_ray.audit.bounds import Guesses, fdp_epsilon, one_run_epsilon
from sapf_ray.audit.families import events_family
from sapf_ray.audit.findings import Finding
from sapf_ray.audit.scores import Observed, Scored, score, simulate
from sapf_ray.privacy.canaries import RAW_NORM
from sapf_ray.privacy.events import DpEvent

# all would guess that exactly half are in, which is wrong by itself
SHARES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
RISKS = (0.7, 0.2, 0.1)  # parts of one minus the confidence: attacks on mechanisms as planned,
# with half and with a tenth of the noise
BROKEN = (2, 5, 10)
LEVEL = 1e-6  # of the tests of parts
_SIMULATIONS = 8


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run says of itself.

    Attributes:
        epsilon: Of all releases together.
        delta: Its delta.
        charges: The events that it is made of, and how often each occurs.
        paid: Names of the releases that the ledger has.
    """

    epsilon: float
    delta: float
    charges: Sequence[tuple[DpEvent, int]]
    paid: Iterable[str]


def white_box(
    observed: Sequence[Observed], coins: np.ndarray, *, claim: Claim, confidence: float
) -> list[Finding]:
    """All findings of one run.

    Args:
        observed: What each release tells of the canaries.
        coins: (m,) bool: which were in.
        claim: What the run says.
        confidence: Of each bound.
    """
    attacks = plan_attacks(observed, len(coins), claim=claim, confidence=confidence)
    return [*attacks.findings(score(observed, coins)), *parts(observed, coins, claim=claim)]


def parts(observed: Sequence[Observed], coins: np.ndarray, *, claim: Claim) -> list[Finding]:
    """The tests of parts of the claim."""
    return [
        noise_test(observed, coins),
        sensitivity_test(observed, coins),
        sampling_test(observed),
        ledger_test(observed, claim),
    ]


Bound = Callable[[Guesses, float], float]
"""Guesses and confidence to epsilon."""


def plan_attacks(
    observed: Sequence[Observed], canaries: int, *, claim: Claim, confidence: float
) -> Attacks:
    """What is guessed, and what it can show: from the plan alone, before a score is seen.

    Args:
        observed: Releases, whose stages and sizes alone are used.
        canaries: m.
        claim: What the run says.
        confidence: Of each bound.
    """
    family = events_family(claim.charges, claim.delta)

    def by_curve(guesses: Guesses, confidence: float) -> float:
        return fdp_epsilon(guesses, family, confidence=confidence)

    def by_pair(guesses: Guesses, confidence: float) -> float:
        return one_run_epsilon(guesses, delta=claim.delta, confidence=confidence)

    honest = [simulate(observed, canaries, seed=1 + i) for i in range(_SIMULATIONS)]
    broken = {factor: simulate(observed, canaries, broken=factor) for factor in BROKEN}
    targets = (honest, [broken[min(BROKEN)]], [broken[max(BROKEN)]])
    guessed = []
    for audit, bound in (("one run, f-DP", by_curve), ("one run, (ε, δ)", by_pair)):
        shares = tuple(
            _best_share(runs, bound, confidence=1 - risk * (1 - confidence))
            for runs, risk in zip(targets, RISKS, strict=True)
        )
        guessed.append(Guessing(audit=audit, bound=bound, shares=shares, confidence=confidence))
    return Attacks(claim=claim, confidence=confidence, guessed=guessed, broken=broken)


def _best_share(runs: Sequence[Scored], bound: Bound, *, confidence: float) -> float:
    """Share of the canaries to guess: the one that shows most of simulated runs."""

    def shown(share: float) -> float:
        return float(np.mean([bound(_guesses(run, share), confidence) for run in runs]))

    return max(SHARES, key=shown)


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """The best of three attacks that guess fewer or more coins, and share the risk.

    Few guesses, the surest, show most of an honest run, but even if all are right they cannot
    falsify a large claim; more guesses can.

    Attributes:
        audit: Name of the bound.
        bound: The bound.
        shares: Of the canaries that are guessed.
        confidence: Of the best one.
    """

    audit: str
    bound: Bound
    shares: tuple[float, ...]
    confidence: float

    def shown(self, run: Scored) -> float:
        """The bound, for one run."""
        return max(
            self.bound(_guesses(run, share), confidence)
            for share, confidence in zip(self.shares, self._confidences, strict=True)
        )

    def ceiling(self, canaries: int) -> float:
        """The bound if every guess were right."""
        made = [2 * int(share * canaries / 2) for share in self.shares]
        return max(
            self.bound(Guesses(canaries=canaries, made=n, right=n), confidence)
            for n, confidence in zip(made, self._confidences, strict=True)
        )

    @property
    def _confidences(self) -> tuple[float, ...]:
        return tuple(1 - risk * (1 - self.confidence) for risk in RISKS)


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """All attacks on one claim by canaries' scores.

    Attributes:
        claim: What the run says.
        confidence: Of each bound.
        guessed: The distribution-free bounds.
        broken: Factor to a simulated run with as many times less noise.
    """

    claim: Claim
    confidence: float
    guessed: Sequence[Guessing]
    broken: Mapping[int, Scored]

    def findings(self, scored: Scored, *, power: bool = True) -> list[Finding]:
        """The bounds and the estimate of one run.

        Args:
            scored: The run's canaries.
            power: Whether to say what broken mechanisms and right guesses would have shown.
        """
        broken = self.broken if power else {}
        return [
            *(self._guess(guessing, scored, broken) for guessing in self.guessed),
            self._gaussian(scored, broken),
        ]

    def _guess(self, guessing: Guessing, scored: Scored, broken: Mapping[int, Scored]) -> Finding:
        canaries = len(scored.coins)
        shown = guessing.shown(scored)
        return Finding(
            audit=guessing.audit,
            quantity="ε",
            claim=self.claim.epsilon,
            shown=shown,
            falsified=shown > self.claim.epsilon,
            confidence=self.confidence,
            ceiling=guessing.ceiling(canaries) if broken else None,
            power={factor: guessing.shown(run) for factor, run in broken.items()},
            note=f"{', '.join(f'{share:.0%}' for share in guessing.shares)} of {canaries:,} "
            "canaries guessed",
        )

    def _gaussian(self, scored: Scored, broken: Mapping[int, Scored]) -> Finding:
        def estimate(run: Scored) -> Estimate:
            auditor = CanaryScoreAuditor(run.of_in, run.of_out)
            return auditor.gaussian(delta=self.claim.delta, confidence=self.confidence)

        found = estimate(scored)
        return Finding(
            audit="Gaussian estimate",
            quantity="ε",
            claim=self.claim.epsilon,
            shown=found.epsilon,
            falsified=False,
            confidence=None,
            power={factor: estimate(run).epsilon for factor, run in broken.items()},
            note=f"scores are {found.mu:.3f} standard deviations apart; lower limit at "
            f"{self.confidence:.0%}: ε = {found.low:.2f}",
        )


def _guesses(run: Scored, share: float) -> Guesses:
    return CanaryScoreAuditor(run.of_in, run.of_out).guesses(share)


# Parts of the claim -----------------------------------------------------------------------------


def noise_test(observed: Sequence[Observed], coins: np.ndarray) -> Finding:
    """Noise on the coordinates of canaries that are out, over what was planned: 1, or more."""
    squares, n = 0.0, 0
    for release in observed:
        out = release.seen[~coins[: len(release.seen)]].astype(np.float64)
        if release.stage.noise_multiplier > 0:
            squares += float(((out / release.stage.noise_multiplier) ** 2).sum())
            n += len(out)
    shown = math.sqrt(squares / n) if n else 0.0
    least = math.sqrt(chi2.ppf(LEVEL, n) / n) if n else 0.0
    return Finding(
        audit="noise of the releases",
        quantity="σ / planned",
        claim=1.0,
        shown=shown,
        falsified=shown < least,
        confidence=1 - LEVEL,
        power={factor: 1 / factor for factor in BROKEN},
        note=f"from {n:,} values; falsified below {least:.4f}",
    )


def sensitivity_test(observed: Sequence[Observed], coins: np.ndarray) -> Finding:
    """By how much a canary that is in and drawn moves a sum, in units of C: 1, or less."""
    weighted, weight = 0.0, 0.0
    for release in observed:
        held = release.drawn & coins[: len(release.seen)]
        precision = max(release.stage.noise_multiplier, 1e-3) ** -2
        weighted += precision * float(release.seen[held].sum())
        weight += precision * int(held.sum())
    shown = weighted / weight if weight else 0.0
    margin = float(norm.isf(LEVEL)) / math.sqrt(weight) if weight else 0.0
    return Finding(
        audit="contribution of a canary",
        quantity="C",
        claim=1.0,
        shown=shown,
        falsified=shown > 1 + margin,
        confidence=1 - LEVEL,
        note=f"falsified above {1 + margin:.4f}; canaries have {RAW_NORM:,.0f} C before clipping",
    )


def sampling_test(observed: Sequence[Observed]) -> Finding:
    """How often canaries are drawn: over the releases of a stage each a binomial number.

    Shuffled epochs draw each equally often, so the counts hardly vary [3].
    """
    statistic, degrees, drawn, expected = 0.0, 0, 0, 0.0
    for stage in {release.stage for release in observed if release.stage.sample_rate < 1}:
        rows = np.stack([release.drawn for release in observed if release.stage == stage])
        n, rate = len(rows), stage.sample_rate
        counts = rows.sum(0)
        statistic += float(((counts - n * rate) ** 2 / (n * rate * (1 - rate))).sum())
        degrees += len(counts)
        drawn += int(counts.sum())
        expected += n * rate * len(counts)
    shown = statistic / degrees if degrees else 1.0
    low, high = chi2.ppf(LEVEL / 2, max(1, degrees)), chi2.isf(LEVEL / 2, max(1, degrees))
    return Finding(
        audit="Poisson sampling",
        quantity="variance / binomial",
        claim=1.0,
        shown=shown,
        falsified=bool(degrees) and not low < statistic < high,
        confidence=1 - LEVEL,
        note=f"drawn {drawn:,} times, {expected:,.0f} expected; shuffled epochs vary far less",
    )


def ledger_test(observed: Sequence[Observed], claim: Claim) -> Finding:
    """Releases that the ledger has not paid, and whether the events compose to the claim."""
    unpaid = Counter(release.name for release in observed) - Counter(set(claim.paid))
    return Finding(
        audit="releases without a ledger line",
        quantity="releases",
        claim=0,
        shown=sum(unpaid.values()),
        falsified=bool(unpaid),
        confidence=1.0,
        note=f"{len(observed):,} releases seen",
    )
