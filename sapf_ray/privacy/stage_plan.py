"""One stage of a privacy plan: releases of one kind, and what each of them costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sapf_ray.privacy.calibration import Charges
from sapf_ray.privacy.events import (
    DpEvent,
    approximate_event,
    exponential_event,
    gaussian_event,
)


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
        slack: Share by which a record's contribution may pass the clipping norm, where floats are
            summed that are too many for an exact sum; the noise is scaled up by it.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    share: float | None
    mechanism: str = "gaussian"
    delta: float = 0.0
    slack: float = 0.0

    def event(self) -> DpEvent:
        """The event of one of the releases.

        Raises:
            ValueError: The mechanism is none that this version knows.
        """
        if self.mechanism not in EVENTS:
            known = ", ".join(EVENTS)
            raise ValueError(f"mechanism {self.mechanism!r}: must be one of {known}")
        return EVENTS[self.mechanism](self)

    def charges(self, noise_multiplier: float | None = None) -> Charges:
        """The events of all releases, by default with the planned noise."""
        stage = self
        if noise_multiplier is not None:
            stage = dataclasses.replace(self, noise_multiplier=noise_multiplier)
        return ((stage.event(), stage.count),)


def _propose_test_release_event(stage: StagePlan) -> DpEvent:
    if stage.noise_multiplier == 0:
        return approximate_event(math.inf, stage.delta)
    return approximate_event(1 / stage.noise_multiplier, stage.delta)


EVENTS: Mapping[str, Callable[[StagePlan], DpEvent]] = {
    "gaussian": lambda stage: gaussian_event(stage.noise_multiplier, stage.sample_rate),
    "exponential": lambda stage: exponential_event(stage.noise_multiplier),
    "propose_test_release": _propose_test_release_event,
}
"""Mechanism of a stage to the event of one of its releases."""
