"""From privacy events to epsilon.

Accounting is that of ``dp-accounting``; this module groups equal events so that a thousand equal
steps cost one convolution, and keeps the terminal quiet. Which accountants there are says
:mod:`sapf_ray.privacy.accountant_table`.

Example::

    step = gaussian_event(noise_multiplier=1.796, sample_rate=4096 / 45_000)
    compose_epsilon([(gaussian_event(5.0), 1), (step, 1000)], 2e-6, accountant="rdp")   # ≈ 10

References:
    1. Koskela, Jälkö, Honkela. Computing tight DP guarantees using FFT. AISTATS 2020. (PLD)
    2. Doroshenko et al. Connect the dots: tighter discrete approximations of privacy loss
       distributions. PoPETs 2022. (the discretisation that dp-accounting uses; an upper bound at
       any interval)
    3. Mironov. Rényi differential privacy. CSF 2017. (RDP)
    4. Mironov, Talwar, Zhang. Rényi DP of the sampled Gaussian mechanism. 2019.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import from_privacy_parameters
from dp_accounting.privacy_accountant import NeighboringRelation, PrivacyAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from sapf_ray.privacy.accountant_table import ACCOUNTANTS, Accountant
from sapf_ray.privacy.events import (
    ApproximateDpEvent,
    Events,
    ExponentialTopKDpEvent,
    group_events,
)

ADJACENCY = NeighboringRelation.ADD_OR_REMOVE_ONE  # prices zero-out, too: docs/privacy.md

# At 1e-4 the planner's noise multiplier differs by under 0.02 % from that at 1e-5 for epsilon >=
# 0.1.
PLD_INTERVAL = 1e-4

# dp-accounting's default orders, with some more between the large ones: small epsilons have their
# optimum there.
RDP_ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    80,
    96,
    128,
    192,
    256,
    384,
    512,
    1024,
)


class _WithoutConvergenceNotice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("_compute_log_a_frac failed to converge")


_NOTICE = _WithoutConvergenceNotice()


@contextlib.contextmanager
def without_notice() -> Iterator[None]:
    """Silences dp-accounting's convergence notice; may be nested."""
    logger = logging.getLogger("absl")
    if _NOTICE in logger.filters:
        yield
        return
    logger.addFilter(_NOTICE)
    try:
        yield
    finally:
        logger.removeFilter(_NOTICE)


class SapfPldAccountant(PLDAccountant):
    """dp-accounting's PLD accountant, which supports the events of this module too."""

    def _maybe_compose(
        self, event: DpEvent, count: int, do_compose: bool
    ) -> PrivacyAccountant.CompositionErrorDetails | None:
        if not isinstance(event, ApproximateDpEvent):
            return super()._maybe_compose(_as_gaussian(event), count, do_compose)
        if do_compose:
            parameters = DifferentialPrivacyParameters(event.epsilon, event.delta)
            loss = from_privacy_parameters(parameters, self._value_discretization_interval)
            self._pld = self._pld.compose(loss.self_compose(count))  # type: ignore[has-type]
        return None

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        """Delta at each of the epsilons (ascending), for adding and removing alike."""
        return [float(delta) for delta in self._pld.get_delta_for_epsilon(list(epsilons))]


class SapfRdpAccountant(RdpAccountant):
    """dp-accounting's RDP accountant, which supports the events of this module too, and is quiet.

    For some (q, sigma) the series of the lowest fractional orders does not converge; dp-accounting
    then leaves the order out, which can only raise epsilon, and logs a warning that tells a user
    nothing to act on. Leaving those orders out for every event would cost up to 80 % in epsilon
    where they do converge.

    (epsilon, delta)-DP has no finite Renyi divergence. Its delta is taken off the target instead:
    the hockey-stick divergence of a composition is at most the sum of these deltas plus that of the
    randomised responses and the rest.
    """

    _revealed = 0.0  # probability that some event reveals everything

    def _maybe_compose(
        self, event: DpEvent, count: int, do_compose: bool
    ) -> PrivacyAccountant.CompositionErrorDetails | None:
        if isinstance(event, dp_event.RepeatAndSelectDpEvent) and _may_reveal(event.event):
            return self.CompositionErrorDetails(
                invalid_event=event,
                error_message="trials of a private choice must have finite Renyi divergences",
            )
        if not isinstance(event, ApproximateDpEvent):
            with without_notice():
                return super()._maybe_compose(_as_gaussian(event), count, do_compose)
        if do_compose:
            response = _randomized_response_rdp(event.epsilon, self._orders)
            self._rdp = self._rdp + count * response  # type: ignore[has-type]
            self._revealed += count * event.delta
        return None

    def get_epsilon(self, target_delta: float) -> float:
        return self.get_epsilon_and_optimal_order(target_delta)[0]

    def get_epsilon_and_optimal_order(self, target_delta: float) -> tuple[float, float]:
        """Epsilon and the order that gives it; epsilon is infinite where the events' own deltas
        exceed the target.
        """
        rest = target_delta - self._revealed
        if rest <= 0:
            return math.inf, float(self._orders[0])
        return compute_epsilon(self._orders, self._rdp, rest)

    def get_delta(self, target_epsilon: float) -> float:
        return self.get_delta_and_optimal_order(target_epsilon)[0]

    def get_delta_and_optimal_order(self, target_epsilon: float) -> tuple[float, float]:
        """Delta, at most 1, and the order that gives it."""
        delta, order = super().get_delta_and_optimal_order(target_epsilon)
        return min(1.0, delta + self._revealed), order

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        """Delta at each of the epsilons."""
        return [float(self.get_delta(epsilon)) for epsilon in epsilons]


def _may_reveal(event: DpEvent) -> bool:
    """Whether the events are of those of which only (epsilon, delta)-DP is known."""
    return any(isinstance(part, ApproximateDpEvent) for part in group_events(event))


def _as_gaussian(event: DpEvent) -> DpEvent:
    if isinstance(event, ExponentialTopKDpEvent):
        return dp_event.GaussianDpEvent(event.noise_multiplier)
    return event


def _randomized_response_rdp(epsilon: float, orders: np.ndarray) -> np.ndarray:
    """Renyi divergence of randomised response, the largest that epsilon-DP allows (Mironov 2017,
    Proposition 5).
    """
    both = np.logaddexp(orders * epsilon, (1 - orders) * epsilon)
    return (both - np.logaddexp(0, epsilon)) / (orders - 1)


PLD = Accountant(title="PLD", make=lambda interval: SapfPldAccountant(ADJACENCY, interval))
RDP = Accountant(title="RDP", make=lambda interval: SapfRdpAccountant(RDP_ORDERS, ADJACENCY))


def make_accountant(name: str, pld_interval: float = PLD_INTERVAL) -> PrivacyAccountant:
    """A fresh accountant under the add/remove-one-image relation.

    Args:
        name: A row of :data:`sapf_ray.privacy.accountant_table.ACCOUNTANTS`.
        pld_interval: Discretisation of the privacy loss; any interval gives an upper bound, a
            coarse one a looser and cheaper one.

    Raises:
        ConfigError: No such row.
    """
    return ACCOUNTANTS[name].make(pld_interval)


def supports(accountant: str, events: Events) -> bool:
    """Whether this accountant can price every one of the events.

    An event without noise has an infinite epsilon whoever is asked.
    """
    asked = make_accountant(accountant)
    return all(
        isinstance(event, dp_event.NonPrivateDpEvent) or asked.supports(event)
        for event in group_events(events)
    )


def epsilon_text(events: Events, delta: float, *, accountant: str) -> str:
    """Epsilon for people: four decimals, or ``n/a`` where the accountant does not support one of
    the events.

    Example:
        >>> from sapf_ray.privacy.events import gaussian_event
        >>> epsilon_text(gaussian_event(5.0), 1e-6, accountant="rdp")
        '0.8999'
    """
    events = group_events(events).items()
    if not supports(accountant, events):
        return "n/a"
    return f"{compose_epsilon(events, delta, accountant=accountant):.4f}"


def compose_epsilon(
    events: Events, delta: float, *, accountant: str, pld_interval: float = PLD_INTERVAL
) -> float:
    """Epsilon of all events together at ``delta``; ``inf`` when one of them has no noise.

    Args:
        events: One event, or pairs of an event and its count.
        delta: Target delta, in (0, 1).
        accountant: A row of :data:`sapf_ray.privacy.accountant_table.ACCOUNTANTS`.
        pld_interval: See :func:`make_accountant`.

    Raises:
        UnsupportedEventError: The accountant cannot price one of them (see :func:`supports`).
    """
    # Sorted, so that the same multiset in another order gives the same floating-point result.
    grouped = sorted(group_events(events).items(), key=repr)
    return _compose_cached(tuple(grouped), delta, accountant=accountant, interval=pld_interval)


@functools.lru_cache(maxsize=512)
def _compose_cached(
    grouped: tuple[tuple[DpEvent, int], ...], delta: float, *, accountant: str, interval: float
) -> float:
    if not grouped:
        return 0.0
    if any(isinstance(event, dp_event.NonPrivateDpEvent) for event, _ in grouped):
        return math.inf
    return float(_composed(grouped, accountant, interval).get_epsilon(delta))


@functools.lru_cache(maxsize=4)
def _composed(
    grouped: tuple[tuple[DpEvent, int], ...], accountant: str, interval: float
) -> PrivacyAccountant:
    """The last few compositions, kept: a second delta costs a lookup. Nobody may add to them."""
    total = make_accountant(accountant, interval)
    for event, count in grouped:
        total.compose(event, count)
    return total


def stage_shares(
    stages: Mapping[str, Sequence[tuple[DpEvent, int]]], delta: float
) -> dict[str, float] | None:
    """Each stage's fraction of the total RDP at the order that minimises epsilon (paper, section
    3.4).

    The same definition serves every accountant: privacy loss distributions do not split into a sum.
    None when a stage has no noise, when an event has no Renyi divergence that we know, or when
    nothing is released, for then there is no total to share.
    """
    if not all(supports("rdp", events) for events in stages.values()):
        return None
    rdp: dict[str, np.ndarray] = {}
    whole = SapfRdpAccountant(RDP_ORDERS, ADJACENCY)
    for name, events in stages.items():
        part = SapfRdpAccountant(RDP_ORDERS, ADJACENCY)
        for event, count in group_events(events).items():
            part.compose(event, count)
            whole.compose(event, count)
        rdp[name] = part.rdp
    total = whole.rdp
    epsilon, order = whole.get_epsilon_and_optimal_order(delta)
    if not math.isfinite(epsilon) or not total.any():
        return None
    index = RDP_ORDERS.index(order)
    return {name: float(cost[index] / total[index]) for name, cost in rdp.items()}
