"""What an image-level plan means for a person with k images, tightly.

Taking a person away takes k images away. In one release of a Poisson sample with rate q, j of them
take part with binomial probability, and then move the sum by at most j times the clipping norm: the
pair of neighbours is dominated by a Gaussian against a mixture of Gaussians with means 0 … k
[1, 2]. Multiplying epsilon by k at the same delta is no bound at all.

Example::

    person_epsilon(plan, 5)     # of a plan made for images, at the plan's own delta

References:
    1. Charles et al. Fine-tuning large language models with user-level differential privacy. 2024
       (arXiv 2407.07737, section 3: ELS, accounted by mixtures of Gaussians).
    2. Choquette-Choo, Ganesh, Steinke, Thakurta. Privacy amplification for matrix mechanisms. ICLR
       2024. (mixture-of-Gaussians mechanisms)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from dp_accounting.dp_event import (
    DpEvent,
    GaussianDpEvent,
    MixtureOfGaussiansDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
)
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom

from sapf_ray.errors import ConfigError
from sapf_ray.privacy.events import Events, describe_event, group_events
from sapf_ray.privacy.planner import PrivacyPlan, plan_events

INTERVAL = 1e-3
"""Width of the discretisation: pessimistic, by less than a percent where epsilon is above 1."""


def person_epsilon(plan: PrivacyPlan, k: int, *, delta: float | None = None) -> float:
    """Epsilon of a person with k images, of all releases of a plan whose unit is one image.

    Args:
        plan: Of Gaussian releases.
        k: Images of a person, at least 1.
        delta: By default the plan's.

    Returns:
        An upper bound; infinite for a plan without noise.

    Raises:
        ValueError: A plan of groups, or of another mechanism than the Gaussian.
    """
    if plan.unit != "image":
        raise ValueError("data.groups is given, and the plan's own epsilon is for a group")
    charges = [(event, count) for _, event, count in plan_events(plan)]
    delta = plan.delta if delta is None else delta
    return group_epsilon(charges, k, delta=delta, interval=INTERVAL)


def group_epsilon(charges: Events, k: int, *, delta: float, interval: float = INTERVAL) -> float:
    """Epsilon of k units together, of releases that are priced for one.

    Args:
        charges: Pairs of an event, Gaussian on all units or on a Poisson sample, and its count.
        k: At least 1.
        delta: In (0, 1).
        interval: Width of the discretisation; any gives an upper bound, a coarse one a looser and
            cheaper one.

    Raises:
        ValueError: An event of another mechanism.
    """
    grouped = tuple(sorted(group_events(charges).items(), key=repr))
    return _group_epsilon(grouped, k, delta=delta, interval=interval)


@functools.lru_cache(maxsize=32)
def _group_epsilon(
    grouped: tuple[tuple[DpEvent, int], ...], k: int, *, delta: float, interval: float
) -> float:
    accountant = PLDAccountant(value_discretization_interval=interval)
    for event, count in grouped:
        if isinstance(event, NonPrivateDpEvent):
            return math.inf
        accountant.compose(_of_several(event, k), count)
    return float(accountant.get_epsilon(delta))


def person_report(plan: PrivacyPlan, images: int) -> dict[str, dict[str, Any]]:
    """What ``sapf plan --images_per_person`` adds to its JSON.

    Raises:
        ConfigError: The plan has no such number.
    """
    try:
        epsilon = person_epsilon(plan, images)
    except ValueError as error:
        raise ConfigError("--images_per_person", images, f"must be left out: {error}") from error
    shown: float | str = epsilon if math.isfinite(epsilon) else "inf"
    return {"person": {"images": images, "epsilon": shown}}


def _of_several(event: DpEvent, k: int) -> DpEvent:
    """One release, for k units of one person."""
    if isinstance(event, GaussianDpEvent):
        return GaussianDpEvent(event.noise_multiplier / k)
    sampled = isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent)
    if not sampled:
        raise ValueError(f"{describe_event(event)}: is no Gaussian release")
    present = np.arange(k + 1)
    return MixtureOfGaussiansDpEvent(
        event.event.noise_multiplier,
        present.astype(float).tolist(),
        binom.pmf(present, k, event.sampling_probability).tolist(),
    )
