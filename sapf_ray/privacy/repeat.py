"""A private choice: a random number of trials, of which the best-scoring one alone is released.

The number of trials K is drawn from a truncated negative binomial or a Poisson distribution, each
trial draws its settings and runs with noise of its own, and one DP measurement scores it. Whatever
K is, the winner costs what one :class:`RepeatAndSelectDpEvent` costs: more than one trial, and far
less than all of them. The number K stays secret: a number fixed beforehand, or known, would cost as
much as the composition of all trials, up to a factor (reference 1, section 3.3).

>>> choice = Repeat(distribution="poisson", mean=5.0)
>>> choice.draw(np.array([0.01, 0.5])).tolist()
[1, 5]

References:
    1. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022.
       (definition 1: the truncated negative binomial; theorems 2 and 6: what the winner costs)
    2. Liu, Talwar. Private selection from private candidates. STOC 2019.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from scipy import stats
from scipy.optimize import brentq

NEGATIVE_BINOMIAL = "negative_binomial"
POISSON = "poisson"


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """How often a trial is repeated before the best is chosen.

    Attributes:
        distribution: ``negative_binomial`` (truncated, so at least one trial) or ``poisson``.
        mean: Mean number of trials, at least 1.
        shape: Eta of the negative binomial, at least 0: 0 is logarithmic, 1 geometric.
        held_out: Number of records, or groups, that trials are scored on and never train on.
    """

    distribution: str
    mean: float
    shape: float = 1.0
    held_out: int = 0

    def event(self, charges: Iterable[tuple[DpEvent, int]]) -> DpEvent:
        """The one event of the whole choice.

        Args:
            charges: The events of one trial, its score's among them, and how often each is paid.
        """
        charges = sorted(charges, key=repr)  # equal multisets are equal events
        if any(isinstance(event, dp_event.NonPrivateDpEvent) for event, _ in charges):
            return dp_event.NonPrivateDpEvent()
        parts = tuple(dp_event.SelfComposedDpEvent(event, count) for event, count in charges)
        shape = math.inf if self.distribution == POISSON else self.shape
        return dp_event.RepeatAndSelectDpEvent(dp_event.ComposedDpEvent(parts), self.mean, shape)

    def whole(self, charged: Counter[DpEvent], planned: Counter[DpEvent]) -> Counter[DpEvent]:
        """What a choice has spent by what one of its trials has: nothing before its first release,
        then at once the whole, for other trials may have released all that is planned.

        Args:
            charged: Events of this trial so far.
            planned: Events of a whole trial.
        """
        return Counter([self.event((charged | planned).items())]) if charged else Counter()

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Numbers of trials, by inversion of the distribution function.

        Args:
            uniform: (n,) secret numbers, uniform in (0, 1).

        Returns:
            (n,) int64, at least 1; of a Poisson distribution at least 0.
        """
        if self.distribution == POISSON:
            drawn = stats.poisson(self.mean).ppf(uniform)
        elif self.mean == 1:
            drawn = np.ones_like(uniform)
        elif self.shape == 0:
            drawn = stats.logser(1 - self._gamma()).ppf(uniform)
        else:
            gamma = self._gamma()
            none = gamma**self.shape  # probability of 0, which is cut off
            drawn = stats.nbinom(self.shape, gamma).ppf(none + uniform * (1 - none)).clip(min=1)
        return drawn.astype(np.int64)

    def _gamma(self) -> float:
        """Gamma of the negative binomial distribution with this mean, above 1; in (0, 1)."""

        def excess(log_gamma: float) -> float:
            return math.log(_mean(self.shape, math.exp(log_gamma)) / self.mean)

        lowest = -math.log(self.mean) - 40 / (1 + self.shape)
        return math.exp(brentq(excess, lowest, -1e-12, xtol=1e-14))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Repeat:
        """Inverse of :meth:`to_dict`.

        Raises:
            TypeError: Missing or unknown keys.
        """
        return cls(**data)


def _mean(shape: float, gamma: float) -> float:
    """Mean of the truncated negative binomial (reference 1, definition 1)."""
    if shape == 0:
        return (1 / gamma - 1) / -math.log(gamma)
    return shape * (1 - gamma) / (gamma * -math.expm1(shape * math.log(gamma)))
