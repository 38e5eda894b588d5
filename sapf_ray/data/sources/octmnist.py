"""OCTMNIST: grey retinal OCT images from MedMNIST+, in four classes.

``data.path`` is one of ``octmnist_128.npz`` (the size the paper uses), ``octmnist_224.npz``,
``octmnist_64.npz``, ``octmnist.npz`` (28 pixels), or a folder that holds them, where the first of
these is taken. The published split is used: 97,477 training and 1,000 test images; the 10,832
validation images stay unused. The published files are deflated; :mod:`sapf_ray.data.npz` explains
how rows are read without holding or unpacking an array of images.

Another MedMNIST set is a subclass of :class:`MedMnist` with a row and a name of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import DATA_SETS, KnownSet
from sapf_ray.data.decoding import decode_pixels
from sapf_ray.data.files import Stamp, check_labels, first_existing, required_path, stamp
from sapf_ray.data.npz import NpzImages, check_npz, npz_checksums, npz_images, npz_vector
from sapf_ray.errors import DataError

_SIZES = ("_128", "_224", "_64", "")


class MedMnist(ImageSource):
    """Base of the single-label sets of MedMNIST+. Opening reads headers and labels, no image.

    A file is called ``{name}{size}.npz``, where ``name`` is the name of the source.

    Attributes:
        row: What is published about the set.
        file: The .npz file.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The file is missing or not in the published format; names it.
    """

    row: KnownSet

    def __init__(self, config: DataConfig) -> None:
        self.file = required_path(config, self.row)
        if self.file.is_dir():
            names = tuple(f"{self.name}{size}.npz" for size in _SIZES)
            self.file = first_existing(self.file, names, row=self.row)
        self.class_names = self.row.class_names
        self.prompts = self.row.prompts
        self.n_train = self._count("train")
        self.n_test = self._count("test")

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labels(split)
        indices = check_indices(indices, len(labels), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        rows = self._images(split).rows(indices)
        for i, pixels in enumerate(rows):
            images[i] = decode_pixels(pixels, resolution)
        return images, labels[indices]

    def labels(self, split: Split) -> np.ndarray:
        return _labels(self.file, split, row=self.row, _stamp=stamp(self.file)).copy()

    def fingerprint(self) -> str:
        """Over name, size and CRC-32 of every array, which the file's own directory holds."""
        checksums = repr(npz_checksums(self.file))
        return hashlib.sha256(checksums.encode()).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Inflates training and test images once, keeping nothing, against their CRC-32.

        A file with the published number of training images must have the published number of test
        images. Its MD5 is not compared: a copy written anew with the same arrays is as good.
        """
        if self.n_train == self.row.n_train and self.n_test != self.row.n_test:
            raise DataError(
                f"{self.file}: {self.n_test} test images, published are {self.row.n_test}; "
                f"{self.row.obtain}"
            )
        check_npz(self.file, tuple(f"{split}_images" for split in splits))

    def _images(self, split: Split) -> NpzImages:
        return npz_images(self.file, f"{split}_images", _stamp=stamp(self.file))

    def _count(self, split: Split) -> int:
        """Number of records, which images and labels must agree on."""
        n_labels = len(self.labels(split))
        n_images = self._images(split).shape[0]
        if n_labels != n_images or n_labels == 0:
            raise DataError(
                f"{self.file}: {n_images} {split}_images and {n_labels} {split}_labels; "
                f"{self.row.obtain}"
            )
        return n_labels


@register("octmnist")
class OctMnist(MedMnist):
    """Labels 0 to 3 as MedMNIST names them."""

    row = DATA_SETS["octmnist"]


@lru_cache(maxsize=4)
def _labels(
    path: Path,
    split: Split,
    *,
    row: KnownSet,
    _stamp: Stamp,
) -> np.ndarray:
    name = f"{split}_labels"
    values = npz_vector(path, name)
    where = f"{path}: {name}"
    return check_labels(values, len(row.class_names), where=where, obtain=row.obtain)
