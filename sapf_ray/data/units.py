"""Units of privacy that are groups of images: a patient, a writer, a person.

What is sampled, clipped and counted is then a group, and adjacency is adding or removing one group
with all its images. Where ``data.groups`` is not given an image is a unit by itself, and nothing
here is used.

A group's contribution to any sum is bounded like one record's: its gradient is the mean over
images that the secret key draws for the step (:meth:`Units.draw`), clipped once; its votes and
counts are shared among its images (:meth:`Units.parts`), so that they are one vote in all.

References:
    1. Charles et al. Fine-tuning large language models with user-level differential privacy. 2024
       (arXiv 2407.07737). (ULS: users are sampled, each one's mean gradient is clipped)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sapf_ray.config.groups import KEY
from sapf_ray.errors import ConfigError
from sapf_ray.files import write_array
from sapf_ray.privacy.keyed_rng import NoiseKey

LEAST_GROUPS = 10
"""Fewer groups than these hide nobody: noise that covers one of them covers everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Which training images belong to which group; as sensitive as the labels.

    Attributes:
        images: (m,) int64 positions of images, group by group.
        starts: (n + 1,) int64; group i has ``images[starts[i]:starts[i + 1]]``, at least one.
        n_images: Number of all training images, m or more.
    """

    images: np.ndarray
    starts: np.ndarray
    n_images: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, names: Sequence[str]) -> Units:
        """Groups by name, in the order of their names.

        Args:
            names: Of each training image's group.
        """
        _, numbers = np.unique(np.asarray(names, dtype=str), return_inverse=True)
        images = np.argsort(numbers, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(numbers))])
        return cls(images=images, starts=starts.astype(np.int64), n_images=len(numbers))

    def members(self, unit: int) -> np.ndarray:
        """Positions of a group's images, int64 ascending."""
        return self.images[self.starts[unit] : self.starts[unit + 1]]

    def draw(
        self, key: NoiseKey, purpose: str, step: int, units: np.ndarray, *, k: int
    ) -> np.ndarray:
        """Images for k draws of each group: all different where it has as many, else all of them,
        some more often than others by one.

        They depend on (key, purpose, step, group) only, as diffusion draws do.

        Args:
            key: The run's bound key.
            purpose: Name of the use.
            step: Number of the release.
            units: (n,) int64 groups.
            k: Draws of a group.

        Returns:
            (n, k) int64 positions of images.
        """
        chosen = np.empty((len(units), k), np.int64)
        seeds = key.seeds(f"{purpose}/images", step, units)
        for row, (unit, seed) in enumerate(zip(units, seeds, strict=True)):
            order = np.random.default_rng(int(seed)).permutation(self.members(unit))
            chosen[row] = np.resize(order, k)
        return chosen

    def parts(self, whole: int) -> np.ndarray:
        """Each image's part of its group's one vote: those of a group add up to at most ``whole``.

        Args:
            whole: What one vote is on an integer grid.

        Returns:
            (n_images,) int64; 0 for images that take no part.
        """
        sizes = np.diff(self.starts)
        parts = np.zeros(self.n_images, np.int64)
        parts[self.images] = np.repeat(whole // sizes, sizes)
        return parts

    def capped(self, most: int, key: NoiseKey) -> Units:
        """At most so many images of each group, chosen by the secret key.

        Args:
            most: At least 1.
            key: The run's bound key.
        """
        units = np.arange(len(self))
        seeds = key.seeds("units/cap", 0, units)
        kept = [
            np.sort(np.random.default_rng(int(seed)).permutation(self.members(int(unit)))[:most])
            for unit, seed in zip(units, seeds, strict=True)
        ]
        starts = np.cumsum([0, *map(len, kept)])
        return Units(images=np.concatenate(kept), starts=starts, n_images=self.n_images)

    def digest(self) -> str:
        """Hex digest that changes when an image changes its group."""
        content = hashlib.sha256(f"{self.n_images}".encode())
        for part in (self.images, self.starts):
            content.update(part.astype("<i8").tobytes())
        return content.hexdigest()

    def save(self, path: Path) -> None:
        """Writes what :meth:`load` reads, mode 0600."""
        table = np.concatenate([[self.n_images, len(self)], self.starts, self.images])
        write_array(path, table.astype(np.int64), mode=0o600)

    @staticmethod
    def load(path: Path | str) -> Units:
        """Reads what :meth:`save` wrote; a process reads each file once."""
        return _load(str(path))


@functools.lru_cache(maxsize=4)
def _load(path: str) -> Units:
    table = np.load(path)
    n_images, n = (int(value) for value in table[:2])
    starts, images = np.split(table[2:], [n + 1])
    return Units(images=images, starts=starts, n_images=n_images)


def checked_units(names: Sequence[str], given: str) -> Units:
    """The groups of a run's training images.

    Args:
        names: Of each training image's group.
        given: ``data.groups``, for messages.

    Raises:
        ConfigError: Too few groups, or one that has more than half of the images. Whether this
            happens depends on the data, and no epsilon covers it.
    """
    units = Units.of(names)
    if len(units) < LEAST_GROUPS:
        raise ConfigError(
            KEY,
            given,
            f"must make at least {LEAST_GROUPS} groups of the training images: among fewer no "
            "noise hides one and leaves the others",
        )
    if 2 * int(np.diff(units.starts).max()) > units.n_images:
        raise ConfigError(
            KEY,
            given,
            "must make no group of more than half of the training images: without it nothing "
            "would be left to learn from",
        )
    return units
