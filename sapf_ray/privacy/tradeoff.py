"""Trade-off curves: what a privacy claim says about every attack, not about one (epsilon, delta).

A mechanism is f-DP if no test between neighbours with false-positive rate a has a false-negative
rate below f(a) [1]. A claim made of events has a curve of its own, read off its privacy loss
distribution: with delta(e) for every e >= 0,

    f(a) = max over e of  1 - delta(e) - exp(e) a   and   exp(-e) (1 - delta(e) - a),

the symmetric curve that the events imply for adding and removing alike. A finite set of e gives a
lower curve, a weaker claim, so a test that rejects it rejects the claim as well, and a
true-positive rate that it allows is an upper bound.

References:
    1. Dong, Roth, Su. Gaussian differential privacy. JRSS-B 2022. (Proposition 2.12)
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

SMALLEST_MU = 1e-9  # mu below which everything is hidden
LARGEST_MU = 1e3  # mu beyond which nothing is
LARGEST_EXPONENT = 700  # exp of more is no number

Curve = Callable[[float], float]
"""x to the smallest y with 1 - f(y) = x: of an event of probability x under one neighbour, the
least probability under the other."""


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Delta of mu-GDP at ``epsilon`` ([1], Corollary 2.13).

    >>> round(gaussian_delta(1.0, 1.0), 4)
    0.1269
    """
    below = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    return max(0.0, below - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at ``delta``; 0 where mu is not above 0.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = mu * mu / 2 + mu * float(-ndtri(delta)) + 1
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, high))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu with which mu-GDP has exactly this delta at this epsilon.

    Args:
        epsilon: At least 0.
        delta: In [0, 1]; 0 is met by mu = 0 alone, 1 by none, which is infinity.

    >>> round(gaussian_mu(4.38, 1e-5), 2)
    1.0
    """
    if delta <= 0:
        return 0.0
    if gaussian_delta(epsilon, LARGEST_MU) < delta or delta >= 1:
        return math.inf
    if gaussian_delta(epsilon, SMALLEST_MU) >= delta:
        return SMALLEST_MU
    return float(
        brentq(lambda mu: gaussian_delta(epsilon, mu) - delta, SMALLEST_MU, LARGEST_MU, xtol=1e-9)
    )


def gdp_parameter(epsilons: Sequence[float], deltas: Sequence[float]) -> float:
    """The smallest mu for which mu-GDP allows all of these pairs of epsilon and delta.

    Args:
        epsilons: At least 0, one or more.
        deltas: In [0, 1], as many.
    """
    return max(gaussian_mu(e, d) for e, d in zip(epsilons, deltas, strict=True))


def true_positive_rate(
    epsilons: Sequence[float], deltas: Sequence[float], *, false_positive_rate: float
) -> float:
    """The most that a test between neighbours can reach against a mechanism that is (e, d)-DP for
    each of the pairs: 1 - f(a), with f of the module's formula.

    Args:
        epsilons: At least 0, one or more.
        deltas: In [0, 1], as many.
        false_positive_rate: a, in (0, 1).

    Returns:
        In [a, 1]: the share of present records that an attacker can find at that rate of false
        alarms.

    >>> true_positive_rate([0.0], [0.0], false_positive_rate=0.01)
    0.01
    """
    a = false_positive_rate
    rates = [1.0]
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        if epsilon < LARGEST_EXPONENT:
            rates.append(delta + math.exp(epsilon) * a)
        rates.append(1 - math.exp(-epsilon) * (1 - delta - a))
    return max(a, min(rates))


def gaussian_curve(mu: float) -> Curve:
    """The curve of mu-GDP."""
    return lambda x: float(ndtr(ndtri(x) - mu))


def curve_of(epsilons: Sequence[float], deltas: Sequence[float]) -> Curve:
    """The curve of a mechanism that is (e, d)-DP for each of the pairs.

    Args:
        epsilons: At least 0.
        deltas: In [0, 1], as many.
    """
    lines = [(0.0, 0.0)]  # slope, intercept
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        lines.append((math.exp(-epsilon), -math.exp(-epsilon) * delta))
        if epsilon < LARGEST_EXPONENT:
            lines.append((math.exp(epsilon), 1 - delta - math.exp(epsilon)))
    kept, starts = _envelope(sorted(lines))

    def curve(x: float) -> float:
        slope, intercept = kept[max(0, bisect.bisect_right(starts, x) - 1)]
        return min(1.0, max(0.0, slope * x + intercept))

    return curve


def _envelope(lines: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], list[float]]:
    """The lines that are the largest somewhere, by rising slope, and where each begins to be."""
    kept: list[tuple[float, float]] = []
    starts: list[float] = []
    for slope, intercept in lines:
        while kept:
            before, height = kept[-1]
            if slope == before:
                if intercept <= height:
                    break
            else:
                cross = (height - intercept) / (slope - before)
                if cross > starts[-1]:
                    kept.append((slope, intercept))
                    starts.append(cross)
                    break
            kept.pop()
            starts.pop()
        if not kept:
            kept.append((slope, intercept))
            starts.append(-math.inf)
    return kept, starts
