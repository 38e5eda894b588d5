"""Attacks on a run's own claim."""

from __future__ import annotations

from sapf_ray.config.kinds import Count, CountOrZero, OpenShare
from sapf_ray.config.section import section


@section("audit")
class AuditConfig:
    """Canaries in a run, which is then a measurement and never released.

    Args:
        canaries: Virtual records that join each release, every one with probability 1/2; 0 is
            an ordinary run. `sapf audit` takes 8000 unless given.
        images: Crafted images among the training images, every one with probability 1/2; 0 is an
            ordinary run. `sapf audit` takes 100 unless given.
        confidence: Probability with which each bound holds.
        mechanism_runs: How often each mechanism is run on either of two neighbours.
    """

    canaries: CountOrZero = 0
    images: CountOrZero = 0
    confidence: OpenShare = 0.95
    mechanism_runs: Count = 10_000
