"""What a run's epsilon means, read off an accountant's curve of delta over epsilon.

Example::

    found = meaning([(gaussian_event(1.5, 0.4), 60)], delta=1e-4)
    found.attacks[0].true_positive_rate    # at most, at 0.1 % false alarms

References:
    1. Dong, Roth, Su. Gaussian differential privacy. JRSS-B 2022.
    2. Carlini et al. Membership inference attacks from first principles. S&P 2022. (why the
       true-positive rate at a low false-positive rate is what counts)
    3. NIST SP 800-226. Guidelines for evaluating differential privacy guarantees. 2025.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting.dp_event import DpEvent

from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import (
    SapfPldAccountant,
    SapfRdpAccountant,
    make_accountant,
    supports,
)
from sapf_ray.privacy.events import Events, group_events
from sapf_ray.privacy.tradeoff import gdp_parameter, true_positive_rate

FALSE_POSITIVE_RATES = (0.001, 0.01)
POINTS = 100  # values of epsilon at which the curve is read
FINEST, COARSEST = 1e-5, 1e-3  # widths of the discretisation; a coarser one is an upper bound, too


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The most that any test for one unit's presence can reach.

    Attributes:
        false_positive_rate: Share of absent units that it takes for present, in (0, 1).
        true_positive_rate: Upper bound on the share of present units that it finds, in [0, 1].
    """

    false_positive_rate: float
    true_positive_rate: float


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What all events together allow an attacker, whatever else they know.

    Attributes:
        accountant: Whose deltas it was read from.
        mu: Smallest mu for which mu-GDP allows the events' delta at every epsilon from 0 to that of
            the claim (read at :data:`POINTS` of them).
        coin: Upper bound on the probability of telling rightly whether a unit took part, where that
            was decided by a fair coin: (1 + delta at epsilon 0) / 2.
        attacks: One for each of :data:`FALSE_POSITIVE_RATES`.
    """

    accountant: str
    mu: float
    coin: float
    attacks: tuple[Attack, ...]


def meaning(events: Events, delta: float) -> Meaning | None:
    """Reads the trade-off curve of the events.

    Args:
        events: Pairs of an event and its count.
        delta: Of the claim, in (0, 1).

    Returns:
        By PLD where it knows the events, else by RDP; None where neither does, where nothing was
        released, or where an event has no noise.
    """
    grouped = tuple(sorted(group_events(events).items(), key=repr))
    if not grouped:
        return None
    for name in ("pld", "rdp"):
        if supports(name, grouped):
            return _meaning(grouped, delta, name)
    return None


@functools.lru_cache(maxsize=8)
def _meaning(grouped: tuple[tuple[DpEvent, int], ...], delta: float, name: str) -> Meaning | None:
    accountant = _composed(grouped, name, COARSEST)
    epsilon = float(accountant.get_epsilon(delta))
    if not math.isfinite(epsilon):
        return None
    interval = max(FINEST, min(COARSEST, epsilon / 10_000))
    if interval < COARSEST:
        accountant = _composed(grouped, name, interval)
    claimed = np.linspace(0, epsilon, POINTS).tolist()
    beyond = np.linspace(epsilon, 2 * epsilon + 1, POINTS)[1:].tolist()
    deltas = [min(1.0, found) for found in accountant.deltas(claimed + beyond)]
    return Meaning(
        accountant=ACCOUNTANTS[name].title,
        mu=gdp_parameter(claimed, deltas[:POINTS]),
        coin=(1 + deltas[0]) / 2,
        attacks=_attacks(claimed + beyond, deltas),
    )


def _composed(
    grouped: Sequence[tuple[DpEvent, int]], name: str, interval: float
) -> SapfPldAccountant | SapfRdpAccountant:
    accountant = make_accountant(name, interval)
    assert isinstance(accountant, SapfPldAccountant | SapfRdpAccountant)
    for event, count in grouped:
        accountant.compose(event, count)
    return accountant


def _attacks(epsilons: Sequence[float], deltas: Sequence[float]) -> tuple[Attack, ...]:
    return tuple(
        Attack(
            false_positive_rate=rate,
            true_positive_rate=true_positive_rate(epsilons, deltas, false_positive_rate=rate),
        )
        for rate in FALSE_POSITIVE_RATES
    )
