"""The single-label 2-D sets of MedMNIST+, a row of :data:`MEDMNIST` each.

``data.path`` is one of ``{name}_128.npz`` (the size at which the paper uses OCTMNIST),
``{name}_224.npz``, ``{name}_64.npz``, ``{name}.npz`` (28 pixels), or a folder that holds them,
where the first of these is taken. The published split is used; validation images stay unused. The
published files are deflated; :mod:`sapf_ray.data.by_position` explains how rows are read without
holding or unpacking an array of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.array_source import ArraySource
from sapf_ray.data.base import SOURCES, SPLITS, Split
from sapf_ray.data.by_position import ArrayRows
from sapf_ray.data.files import Stamp, check_labels, first_existing, required_path, stamp
from sapf_ray.data.known_set import KnownSet
from sapf_ray.data.medmnist_sets import MEDMNIST, NOT_OFFERED
from sapf_ray.data.npz import check_npz, npz_checksums, npz_integers, npz_rows
from sapf_ray.errors import DataError

_SIZES = ("_128", "_224", "_64", "")


class MedMnist(ArraySource):
    """One set. Opening reads headers and labels, no image.

    Attributes:
        file: The .npz file.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The file is missing or not in the published format; names it.
    """

    def __init__(self, config: DataConfig, name: str) -> None:
        self.name = name
        row = self.row
        self.file = required_path(config, row)
        if self.file.is_dir():
            names = tuple(f"{name}{size}.npz" for size in _SIZES)
            self.file = first_existing(self.file, names, row=row)
        self._refuse_another_set()
        self.open_published(row)
        self.resolution = self.pixel_rows("train").shape[2]

    @property
    def row(self) -> KnownSet:
        return MEDMNIST[self.name]

    def pixel_rows(self, split: Split) -> ArrayRows:
        return npz_rows(self.file, f"{split}_images", _stamp=stamp(self.file))

    def labels(self, split: Split) -> np.ndarray:
        return _labels(self.file, split, row=self.row, _stamp=stamp(self.file)).copy()

    def fingerprint(self) -> str:
        """Over name, size and CRC-32 of every array, which the file's own directory holds."""
        checksums = repr(npz_checksums(self.file))
        return hashlib.sha256(checksums.encode()).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Inflates the images once, keeping nothing, against their CRC-32.

        A file with the published number of training images must have the published number of test
        images. Its MD5 is not compared: a copy written anew with the same arrays is as good.
        """
        self.check_published_test(self.row)
        check_npz(self.file, tuple(f"{split}_images" for split in splits))

    def _refuse_another_set(self) -> None:
        """By the file's name: sets of the collection differ in nothing else but their labels."""
        stem = self.file.stem.partition("_")[0].lower()
        if stem in NOT_OFFERED:
            raise DataError(f"{self.file}: {stem} {NOT_OFFERED[stem]}")
        if stem in MEDMNIST and stem != self.name:
            raise DataError(f"{self.file}: is {stem}, not {self.name}; set data.source = {stem}")


@lru_cache(maxsize=4)
def _labels(
    path: Path,
    split: Split,
    *,
    row: KnownSet,
    _stamp: Stamp,
) -> np.ndarray:
    name = f"{split}_labels"
    values = npz_integers(path, name)
    where = f"{path}: {name}"
    return check_labels(values, len(row.class_names), where=where, obtain=row.obtain)


for _name in MEDMNIST:
    SOURCES[_name] = partial(MedMnist, name=_name)
