"""Claims in a row, from private to not private: what a test must reject to falsify a claim.

:class:`Family` puts trade-off curves (:mod:`sapf_ray.privacy.tradeoff`) in a row: the events with
all noise divided by k. To reject the curve of k = 1 is to falsify the claim. The epsilon that
belongs to the largest rejected k is the bound of :func:`sapf_ray.audit.bounds.fdp_epsilon`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from sapf_ray.privacy.accountants import SapfPldAccountant, make_accountant
from sapf_ray.privacy.events import ApproximateDpEvent, ExponentialTopKDpEvent
from sapf_ray.privacy.tradeoff import Curve, curve_of, gaussian_curve, gaussian_epsilon

POINTS = 80  # values of e at which a curve is read off
LARGEST = 1e3  # epsilon beyond which nothing is told apart


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
