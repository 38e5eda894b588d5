"""Labels by a private head: one noisy release of class means of public features.

A record contributes to its own class's row only: its projected features ``w``, bounded by the
radius R, the number one, and, over all classes together, its squared norm. These are weighted so
that the whole contribution has norm at most 1:

    (a w / R,  b,  c |w|² / R²)    with  a² + b² + c² = 1

Adding or removing a record changes the sum by exactly that, so its L2 sensitivity is 1. A group's
contribution is the sum of its images', clipped once to norm 1 as a whole: images of different
classes lie in different rows, so k of them have a norm of about the root of k only, and count the
more; a mean over the images would be as small for all of them as for images of one class. ``b`` is
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
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.release import Releaser
from sapf_ray.stages import Stage

SENSITIVITY = 1.0
RELEASE = "head"
ENERGY_WEIGHT = 0.15
CLIP = Clip(bound=SENSITIVITY, mode="flat")


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


Block = tuple[np.ndarray, np.ndarray]
"""Features float32 (n, d) and labels int64 (n,) of some images."""

GroupBlock = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The same of all images of some groups, and which group each is of: int64 (n,) in [0, groups)."""


def exact_sum(records: Iterable[Block], projection: Projection, *, n_classes: int) -> ExactSum:
    """The exact sum over the records of their contributions: sensitive.

    Args:
        records: Blocks of features and labels in [0, n_classes); a label ``SKIPPED`` or features
            that are not numbers contribute nothing.
        projection: Public.
        n_classes: C.

    Returns:
        Tensors (C, k), (C,) and (1,) of sensitivity 1.

    Raises:
        DataError: A label outside the range.
    """
    total = _zero(projection, n_classes)
    for features, labels in records:
        _check_labels(labels, n_classes)
        sums, counts, energies = map(torch.from_numpy, _contributions(features, projection))
        for label in range(n_classes):
            own = torch.from_numpy(labels == label)
            added = CLIP.sum([sums[own], counts[own], energies[own]]).units
            total.units[0][label] += added[0]
            total.units[1][label] += added[1][0]
            total.units[2][:] += added[2]
    return total


def group_sum(groups: Iterable[GroupBlock], projection: Projection, *, n_classes: int) -> ExactSum:
    """As :func:`exact_sum`, where a group of images is the unit of privacy.

    Args:
        groups: Blocks of whole groups: the bound holds for what one block has of a group.
        projection: Public.
        n_classes: C.

    Raises:
        DataError: A label outside the range.
    """
    total = _zero(projection, n_classes)
    for features, labels, owners in groups:
        _check_labels(labels, n_classes)
        parts = _contributions(features, projection)
        counted = (labels != SKIPPED) & np.isfinite(parts[0]).all(1)
        owner, label = owners[counted], labels[counted]
        sums, counts, energies = (part[counted] for part in parts)
        n_groups = int(owners.max(initial=-1)) + 1
        of_groups = (
            np.zeros((n_groups, n_classes, projection.size)),
            np.zeros((n_groups, n_classes)),
            np.zeros((n_groups, 1)),
        )
        np.add.at(of_groups[0], (owner, label), sums)
        np.add.at(of_groups[1], (owner, label), counts[:, 0])
        np.add.at(of_groups[2], owner, energies)
        rows = [torch.from_numpy(part.reshape(n_groups, -1)) for part in of_groups]
        for part, added in zip(total.units, CLIP.sum(rows).units, strict=True):
            part += added.view_as(part)
    return total


def _zero(projection: Projection, n_classes: int) -> ExactSum:
    return ExactSum.zeros([(n_classes, projection.size), (n_classes,), (1,)], SENSITIVITY)


def _check_labels(labels: np.ndarray, n_classes: int) -> None:
    if len(labels) and not SKIPPED <= labels.min() <= labels.max() < n_classes:
        raise DataError(f"a record's label lies outside [0, {n_classes})")


def _contributions(
    features: np.ndarray, projection: Projection
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image the numbers of its class's row (n, k), its count (n, 1) and energy (n, 1)."""
    weights = Weights.of(projection.size)
    rows = projection(features) / projection.radius
    energy = np.square(rows).sum(1, keepdims=True)
    return weights.sums * rows, np.full_like(energy, weights.count), weights.energy * energy


def release_head(total: ExactSum, projection: Projection, *, releaser: Releaser) -> ClassHead:
    """Pays and draws the release, and makes the head of it.

    Args:
        total: :func:`exact_sum` of the records, or :func:`group_sum` of the groups.
        projection: The same.
        releaser: Its plan's ``head`` fixes the noise.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been drawn.
    """
    noisy = releaser.gaussian(RELEASE, total, stage=Stage.HEAD)
    stage = releaser.plan.head
    assert stage is not None
    return from_noisy(
        [part.numpy() for part in noisy],
        projection,
        noise_multiplier=stage.noise_multiplier,
        n_records=releaser.plan.n_records,
        grouped=releaser.plan.unit == "group",
    )


def from_noisy(
    noisy: list[np.ndarray],
    projection: Projection,
    *,
    noise_multiplier: float,
    n_records: int,
    grouped: bool = False,
) -> ClassHead:
    """The head that follows from the released numbers.

    Args:
        noisy: (C, k), (C,) and (1,).
        projection: Public.
        noise_multiplier: Standard deviation of the noise of each number.
        n_records: N, public.
        grouped: Whether N counts groups. Their images weigh more together than N, and how much is
            known from the noisy counts alone.
    """
    sums, counts, energy = noisy
    weights = Weights.of(projection.size)
    weight = float(n_records)
    if grouped:
        weight = max(weight, float(counts.sum()) / weights.count)
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
        n_records=weight,
    )
