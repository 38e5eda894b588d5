"""Trade-off curves: what a privacy claim says about every attack, not about one (epsilon, delta).

A mechanism is f-DP if no test between neighbours with false-positive rate a has a false-negative
rate below f(a) [1]. A claim made of events has a curve of its own, read off its privacy loss
distribution: with delta(e) for every e >= 0,

    f(a) = max over e of  1 - delta(e) - exp(e) a   and   exp(-e) (1 - delta(e) - a),

the symmetric curve that the events imply for adding and removing alike. A finite set of e gives a
lower curve, a weaker claim, so a test that rejects it rejects the claim as well.

:class:`Family` puts such curves in a row: the events with all noise divided by k. To reject the
curve of k = 1 is to falsify the claim. The epsilon that belongs to the largest rejected k is the
bound of :func:`sapf_ray.audit.bounds.fdp_epsilon`.

References:
    1. Dong, Roth, Su. Gaussian differential privacy. JRSS-B 2022. (Proposition 2.12)
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from sapf_ray.privacy.accountants import SapfPldAccountant, make_accountant
from sapf_ray.privacy.events import ApproximateDpEvent, ExponentialTopKDpEvent

Curve = Callable[[float], float]
"""x to the smallest y with 1 - f(y) = x: of an event of probability x under one neighbour, the
least probability under the other."""

POINTS = 80  # values of e at which a curve is read off
LARGEST = 1e3  # epsilon beyond which nothing is told apart


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
        if epsilon < 700:
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """Claims in a row, from private to not private, numbered by k > 0; k = 1 is the claim.

    Attributes:
        curve: k to its curve.
        epsilon: k to its epsilon at the claim's delta.
    """

    curve: Callable[[float], Curve]
    epsilon: Callable[[float], float]


def gaussian_family(mu: float, delta: float) -> Family:
    """k mu-GDP; the claim is that of one Gaussian release."""
    return Family(
        curve=lambda k: gaussian_curve(k * mu),
        epsilon=lambda k: gaussian_epsilon(k * mu, delta),
    )


def with_noise_divided(event: DpEvent, k: float) -> DpEvent:
    """The event of the same release with k times less noise."""
    if isinstance(event, dp_event.GaussianDpEvent):
        return dp_event.GaussianDpEvent(event.noise_multiplier / k)
    if isinstance(event, ExponentialTopKDpEvent):
        return ExponentialTopKDpEvent(event.noise_multiplier / k)
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        inner = with_noise_divided(event.event, k)
        return dp_event.PoissonSampledDpEvent(event.sampling_probability, inner)
    if isinstance(event, ApproximateDpEvent):
        return ApproximateDpEvent(event.epsilon * k, event.delta)
    raise ValueError(f"{event!r}: has no noise to divide")


def events_family(charges: Sequence[tuple[DpEvent, int]], delta: float) -> Family:
    """The composition of events, all their noise divided by k.

    Args:
        charges: Events and how often each occurs.
        delta: Of the claim.
    """
    return _events_family(tuple(charges), delta)


@functools.lru_cache(maxsize=8)
def _events_family(charges: tuple[tuple[DpEvent, int], ...], delta: float) -> Family:
    """The same, kept: its curves take seconds and serve every audit of a run."""

    @functools.lru_cache(maxsize=64)
    def composed(k: float) -> SapfPldAccountant:
        # a coarse discretisation is an upper bound of the loss, and so a weaker claim
        interval = 2e-3 if k <= 1 else 1e-2
        accountant = make_accountant("pld", pld_interval=interval)
        for event, count in charges:
            accountant.compose(with_noise_divided(event, k), count)
        assert isinstance(accountant, SapfPldAccountant)
        return accountant

    @functools.lru_cache(maxsize=64)
    def epsilon(k: float) -> float:
        return min(LARGEST, float(composed(k).get_epsilon(delta)))

    @functools.lru_cache(maxsize=64)
    def curve(k: float) -> Curve:
        widest = max(1.0, float(composed(k).get_epsilon(1e-9)))
        epsilons = np.linspace(0, min(LARGEST, widest), POINTS).tolist()
        return curve_of(epsilons, [float(composed(k).get_delta(e)) for e in epsilons])

    return Family(curve=curve, epsilon=epsilon)
