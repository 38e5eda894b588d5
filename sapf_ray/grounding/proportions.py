"""Class proportions of the records, released once: one noisy count a class.

Adding or removing a record moves one count by one, so their L2 sensitivity is 1.

References:
    1. Dwork, McSherry, Nissim, Smith. Calibrating noise to sensitivity. TCC 2006.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sapf_ray.config import RunConfig
from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.latents import LatentCache
from sapf_ray.models.class_head import ClassHead
from sapf_ray.privacy.fixed_point import ONE_VOTE, ExactSum
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs.context import RunContext
from sapf_ray.stages import Stage

SENSITIVITY = 1.0
RELEASE = "proportions"


def find_proportions(run: RunContext) -> dict[str, Any]:
    """The remedy's part of the stage: its release, or what a head's says of the counts."""
    if run.plan.head is not None:
        noisy = ClassHead.load(run.directory.head).shares
    else:
        labels = LatentCache(str(run.latents)).counted_labels()
        noisy = release_counts(
            labels, len(run.source.class_names), releaser=run.releaser, parts=run.vote_parts
        )
    return {RELEASE: proportions(noisy)}


def release_counts(
    labels: np.ndarray, n_classes: int, *, releaser: Releaser, parts: np.ndarray | None = None
) -> np.ndarray:
    """Counts with noise, float64 (n_classes,): the only way from exact ones on.

    Args:
        labels: int64 (n,) in [0, n_classes); a record with the label ``SKIPPED`` does not count.
        n_classes: Number of classes.
        releaser: Its plan's ``proportions`` fixes the noise.
        parts: int64 (n,) of each record in its group's one count (:meth:`Units.parts` of
            ``ONE_VOTE``); None where each counts by itself.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
        DataError: A label outside the range.
    """
    counts_here = labels != SKIPPED
    counted = labels[counts_here]
    if len(counted) and not 0 <= counted.min() <= counted.max() < n_classes:
        raise DataError(f"a record's label lies outside [0, {n_classes})")
    counts = np.zeros(n_classes, np.int64)
    np.add.at(counts, counted, ONE_VOTE if parts is None else parts[counts_here])
    total = ExactSum.of([torch.from_numpy(counts)], SENSITIVITY)
    (noisy,) = releaser.gaussian(RELEASE, total, stage=Stage.PROPORTIONS)
    return noisy.numpy()


def proportions(noisy: np.ndarray) -> list[float]:
    """Shares that add up to one, of counts some of which noise may have made negative.

    >>> proportions(np.array([30.0, -2.0, 10.0]))
    [0.75, 0.0, 0.25]
    >>> proportions(np.array([-1.0, -2.0]))
    [0.5, 0.5]
    """
    counts = np.maximum(noisy, 0.0)
    if counts.sum() == 0:
        counts = np.ones_like(counts)
    return [round(float(share), 6) for share in counts / counts.sum()]


def check_proportions(config: RunConfig, plan: PrivacyPlan) -> None:
    """Refuses to pay for what is given; spends nothing.

    Raises:
        ConfigError: Class proportions are given, too.
    """
    given = config.synthesis.class_proportions
    if RELEASE in plan.remedies and given:
        raise ConfigError(
            "synthesis.class_proportions",
            list(given),
            "must be left out where grounding.remedies has proportions, which finds them",
        )
