"""Lower bounds on epsilon from right and wrong guesses.

One run with m canaries, each in by its own fair coin; an attacker guesses r of the coins and v
guesses are right. Under (epsilon, delta)-DP, v is stochastically at most a binomial number, up to
delta [1, Theorem 5.2]; under f-DP the recursion of [2, Algorithm 3] bounds its law by the whole
curve. Either gives a p-value for a claim, and the bound is the largest claim whose p-value is below
one minus the confidence.

Guesses that are all right are not proof of any epsilon: r of them show no more than about
log(r / log(1 / (1 - confidence))), which is :func:`ceiling`.

Many runs of one mechanism on two fixed neighbours give rates of true and false positives instead:
:func:`clopper_pearson_epsilon`.

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Mahloujifar, Melis, Chaudhuri. Auditing f-differential privacy in one run. 2024.
       (arXiv 2410.22235)
    3. Clopper, Pearson. The use of confidence or fiducial limits illustrated in the case of the
       binomial. Biometrika 1934.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import beta, binom

from sapf_ray.audit.families import Family
from sapf_ray.privacy.tradeoff import Curve

SMALLEST_FACTOR = 2.0**-10
LARGEST_FACTOR = 2.0**6
FACTOR_STEP = 1.02  # two claims of a family whose noise differs by less are not told apart


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """The outcome of one attack.

    Attributes:
        canaries: m, those that are not guessed included.
        made: r, in [0, m].
        right: v, in [0, r].
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ValueError(f"{self}: must be 0 <= right <= made <= canaries")


def one_run_p_value(guesses: Guesses, epsilon: float, *, delta: float) -> float:
    """Probability, at most, of so many right guesses under (epsilon, delta)-DP [1].

    >>> round(one_run_p_value(Guesses(canaries=100, made=100, right=100), 3.0, delta=0.0), 4)
    0.0078
    """
    right, made = guesses.right, guesses.made
    rate = expit(epsilon)
    tail = float(binom.sf(right - 1, made, rate))
    if delta == 0:
        return tail
    back = np.arange(1, right + 1)
    between = binom.sf(right - back - 1, made, rate) - tail
    slope = float(np.max(between / back, initial=0.0))
    return min(1.0, tail + slope * delta * 2 * guesses.canaries)


def one_run_epsilon(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """Largest epsilon that the guesses falsify at this delta; 0 where they falsify none.

    Args:
        guesses: Of canaries with fair coins, in one run.
        delta: In [0, 1).
        confidence: In (0, 1).
    """

    def falsified(epsilon: float) -> bool:
        return one_run_p_value(guesses, epsilon, delta=delta) <= 1 - confidence

    return _largest(falsified)


def fdp_rejects(guesses: Guesses, curve: Curve, *, confidence: float) -> bool:
    """Whether so many right guesses falsify f-DP with this curve [2]."""
    m, made, right = guesses.canaries, guesses.made, guesses.right
    alpha = 1 - confidence
    r = alpha * right / m
    h = alpha * (made - right) / m
    for i in range(right - 1, -1, -1):
        higher = max(h, curve(min(1.0, r)))
        if higher == h:
            break  # then neither changes any more
        r = min(1.0, r + i / (made - i) * (higher - h))
        h = higher
    return r + h > made / m


def fdp_factor(guesses: Guesses, family: Family, *, confidence: float) -> float:
    """Largest k of the family, to 2 %, that the guesses falsify; 0 where they falsify none.

    The result is at least 1 exactly where the claim itself is falsified.
    """

    def falsified(number: int) -> bool:
        return fdp_rejects(guesses, family.curve(FACTOR_STEP**number), confidence=confidence)

    low = math.floor(math.log(SMALLEST_FACTOR, FACTOR_STEP))
    high = math.ceil(math.log(LARGEST_FACTOR, FACTOR_STEP))
    if not falsified(low):
        return 0.0
    start, width = 0, 8
    if falsified(start):
        low = start
        while low + width < high and falsified(low + width):
            low, width = low + width, 2 * width
        high = min(high, low + width)
    else:
        high = start
        while high - width > low and not falsified(high - width):
            high, width = high - width, 2 * width
        low = max(low, high - width)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if falsified(middle) else (low, middle)
    return FACTOR_STEP**low


def fdp_epsilon(guesses: Guesses, family: Family, *, confidence: float) -> float:
    """Epsilon, at the family's delta, of the largest k that the guesses falsify."""
    factor = fdp_factor(guesses, family, confidence=confidence)
    return family.epsilon(factor) if factor > 0 else 0.0


def ceiling(canaries: int, *, delta: float, confidence: float, made: int | None = None) -> float:
    """What :func:`one_run_epsilon` would say if every guess were right.

    Args:
        canaries: m.
        delta: In [0, 1).
        confidence: In (0, 1).
        made: Number of guesses; all canaries unless given.

    >>> round(ceiling(1000, delta=0.0, confidence=0.95), 2)
    5.81
    """
    made = canaries if made is None else made
    all_right = Guesses(canaries=canaries, made=made, right=made)
    return one_run_epsilon(all_right, delta=delta, confidence=confidence)


def clopper_pearson(hits: int, n: int, *, confidence: float) -> tuple[float, float]:
    """One-sided limits of a rate, each at this confidence [3]: (lower, upper).

    >>> low, high = clopper_pearson(0, 100, confidence=0.95)
    >>> low, round(high, 4)
    (0.0, 0.0295)
    """
    low = float(beta.ppf(1 - confidence, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(confidence, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Outcomes of a mechanism on two neighbours, as a test decides them.

    Attributes:
        hits: Runs on the first that the test accepts.
        runs: Runs on the first.
        false_hits: Runs on the second that it accepts.
        false_runs: Runs on the second.
    """

    hits: int
    runs: int
    false_hits: int
    false_runs: int

    def limits(self, confidence: float) -> tuple[float, float]:
        """Lower limit of the first rate and upper limit of the second, jointly."""
        each = 1 - (1 - confidence) / 2
        low, _ = clopper_pearson(self.hits, self.runs, confidence=each)
        _, high = clopper_pearson(self.false_hits, self.false_runs, confidence=each)
        return low, high


def clopper_pearson_epsilon(rates: Rates, *, delta: float, confidence: float) -> float:
    """log((tpr - delta) / fpr) at the joint limits of both rates; at least 0.

    The test must not have been chosen from the same runs.
    """
    low, high = rates.limits(confidence)
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def _largest(falsified: Callable[[float], bool]) -> float:
    """Root of a property that holds up to some epsilon; 0 where it never holds."""
    if not falsified(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while falsified(high):
        low, high = high, 2 * high
    return float(brentq(lambda epsilon: 0.5 - falsified(epsilon), low, high, xtol=1e-6))
