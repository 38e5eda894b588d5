"""Labels by a private head: one noisy release of class means of public features.

A record contributes to its own class's row only: its projected features ``w``, bounded by the
radius R, the number one, and, over all classes together, its squared norm. These are weighted so
that the whole contribution has norm at most 1:

    (a w / R,  b,  c |w|² / R²)    with  a² + b² + c² = 1

Adding or removing a record changes the sum by exactly that, so its L2 sensitivity is 1. ``b`` is
the share that makes the error of a mean smallest: the sum's k noisy numbers and the count's one
count as k / a² + 1 / b², which is least where a² is √k times b². ``c`` is small, for it is noise
against N.

Everything else (shrinkage, labels) is post-processing, see :mod:`sapf_ray.models.class_head`.

References:
    1. Dwork, McSherry, Nissim, Smith. Calibrating noise to sensitivity. TCC 2006.
    2. Tramèr, Boneh. Differentially private learning needs better features. ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import DataError
from sapf_ray.models.class_head import ClassHead, Noise, Projection, head_of
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.fixed_point import ONE_VOTE, ExactSum
from sapf_ray.privacy.release import Releaser
from sapf_ray.stages import Stage

SENSITIVITY = 1.0
RELEASE = "head"
ENERGY_WEIGHT = 0.15


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a record's contribution of norm 1 is shared among its parts; see the module."""

    sums: float
    count: float
    energy: float

    @classmethod
    def of(cls, size: int) -> Weights:
        """For ``size`` directions."""
        rest = 1 - ENERGY_WEIGHT**2
        count = math.sqrt(rest / (math.sqrt(size) + 1))
        sums = math.sqrt(rest - count**2)
        return cls(sums=sums, count=count, energy=ENERGY_WEIGHT)


def exact_sum(
    records: Iterable[tuple[np.ndarray, np.ndarray]],
    projection: Projection,
    *,
    n_classes: int,
    parts: np.ndarray | None = None,
) -> ExactSum:
    """The exact sum over the records of their contributions: sensitive.

    A group's contribution is the mean of its images', whatever their classes.

    Args:
        records: Blocks of features float32 (n, d) and labels int64 (n,) in [0, n_classes); a label
            ``SKIPPED`` or features that are not numbers contribute nothing.
        projection: Public.
        n_classes: C.
        parts: int64 of each record in its group's one contribution (:meth:`Units.parts` of
            ``ONE_VOTE``), in the records' order; None where each has its own.

    Returns:
        Tensors (C, k), (C,) and (1,) of sensitivity 1.

    Raises:
        DataError: A label outside the range.
    """
    weights = Weights.of(projection.size)
    clip = Clip(bound=SENSITIVITY, mode="flat")
    total = ExactSum.zeros([(n_classes, projection.size), (n_classes,), (1,)], SENSITIVITY)
    first = 0
    for features, labels in records:
        mine = slice(first, first + len(labels))
        first += len(labels)
        if len(labels) and not SKIPPED <= labels.min() <= labels.max() < n_classes:
            raise DataError(f"a record's label lies outside [0, {n_classes})")
        rows = projection(features) / projection.radius
        scaled = torch.from_numpy(rows)
        energy = torch.from_numpy(np.square(rows).sum(1, keepdims=True))
        ones = torch.ones_like(energy)
        rows_of = [weights.sums * scaled, weights.count * ones, weights.energy * energy]
        shares = None if parts is None else torch.from_numpy(parts[mine] / ONE_VOTE)
        for label in range(n_classes):
            own = torch.from_numpy(labels == label)
            sums, count, squares = clip.sum(
                [part[own] for part in rows_of], shares=None if shares is None else shares[own]
            ).units
            total.units[0][label] += sums
            total.units[1][label] += count[0]
            total.units[2][:] += squares
    return total


def release_head(
    records: Iterable[tuple[np.ndarray, np.ndarray]],
    projection: Projection,
    *,
    n_classes: int,
    releaser: Releaser,
    parts: np.ndarray | None = None,
) -> ClassHead:
    """Pays and draws the release, and makes the head of it.

    Args:
        records: See :func:`exact_sum`.
        projection: Public.
        n_classes: C.
        releaser: Its plan's ``head`` fixes the noise.
        parts: See :func:`exact_sum`.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been drawn.
    """
    total = exact_sum(records, projection, n_classes=n_classes, parts=parts)
    noisy = releaser.gaussian(RELEASE, total, stage=Stage.HEAD)
    stage = releaser.plan.head
    assert stage is not None
    return from_noisy(
        [part.numpy() for part in noisy],
        projection,
        noise_multiplier=stage.noise_multiplier,
        n_records=releaser.plan.n_records,
    )


def from_noisy(
    noisy: list[np.ndarray], projection: Projection, *, noise_multiplier: float, n_records: int
) -> ClassHead:
    """The head that follows from the released numbers.

    Args:
        noisy: (C, k), (C,) and (1,).
        projection: Public.
        noise_multiplier: Standard deviation of the noise of each number.
        n_records: N, public.
    """
    sums, counts, energy = noisy
    weights = Weights.of(projection.size)
    noise = noise_multiplier * SENSITIVITY
    return head_of(
        projection,
        sums * projection.radius / weights.sums,
        counts / weights.count,
        energy=float(energy[0]) * projection.radius**2 / weights.energy,
        noise=Noise(
            sum=noise * projection.radius / weights.sums,
            count=noise / weights.count,
            energy=noise * projection.radius**2 / weights.energy,
        ),
        n_records=n_records,
    )
