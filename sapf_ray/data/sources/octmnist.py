"""OCTMNIST: grey retinal OCT images from MedMNIST+, in four classes.

``data.path`` is one of ``octmnist_128.npz`` (the size the paper uses), ``octmnist_224.npz``,
``octmnist_64.npz``, ``octmnist.npz`` (28 pixels), or a folder that holds them, where the first of
these is taken. The published split is used: 97,477 training and 1,000 test images; the 10,832
validation images stay unused. The published files are deflated; :mod:`sapf_ray.data.npz` tells how
rows are read without holding or unpacking an array of images.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import CATALOG
from sapf_ray.data.decoding import decode_pixels
from sapf_ray.data.files import SPLITS, Stamp, check_labels, first_existing, required_path, stamp
from sapf_ray.data.npz import NpzImages, check_npz, npz_checksums, npz_images, npz_vector
from sapf_ray.errors import DataError

_ROW = CATALOG["octmnist"]
_FILES = ("octmnist_128.npz", "octmnist_224.npz", "octmnist_64.npz", "octmnist.npz")


@register("octmnist")
class OctMnist(ImageSource):
    """Labels 0 to 3 as MedMNIST names them. Opening reads headers and labels, no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The file is missing or not in the published format; names it.
    """

    def __init__(self, config: DataConfig) -> None:
        path = required_path(config, _ROW)
        self.file = first_existing(path, _FILES, row=_ROW) if path.is_dir() else path
        self.class_names, self.prompts = _ROW.class_names, _ROW.prompts
        self.n_train, self.n_test = (len(self.labels(split)) for split in SPLITS)
        for split in SPLITS:
            n, rows = len(self.labels(split)), self._images(split).shape[0]
            if n != rows or n == 0:
                raise DataError(
                    f"{self.file}: {rows} {split}_images and {n} {split}_labels; {_ROW.obtain}"
                )

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labels(split)
        indices = check_indices(indices, len(labels), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        for row, pixels in enumerate(self._images(split).rows(indices)):
            images[row] = decode_pixels(pixels, resolution)
        return images, labels[indices]

    def labels(self, split: Split) -> np.ndarray:
        return _labels(self.file, split, stamp(self.file)).copy()

    def fingerprint(self) -> str:
        """Over name, size and CRC-32 of every array, which the file's own directory holds."""
        return hashlib.sha256(repr(npz_checksums(self.file)).encode()).hexdigest()

    def verify(self) -> None:
        """Inflates training and test images once, keeping nothing, against their CRC-32.

        A file with the published number of training images must have the published number of test
        images. Its MD5 is not asked for: a copy written anew with the same arrays is as good.
        """
        if self.n_train == _ROW.n_train and self.n_test != _ROW.n_test:
            raise DataError(
                f"{self.file}: {self.n_test} test images, published are {_ROW.n_test}; {_ROW.obtain}"
            )
        check_npz(self.file, tuple(f"{split}_images" for split in SPLITS))

    def _images(self, split: Split) -> NpzImages:
        return npz_images(self.file, f"{split}_images", _stamp=stamp(self.file))


@lru_cache(maxsize=4)
def _labels(path: Path, split: Split, _stamp: Stamp) -> np.ndarray:
    name = f"{split}_labels"
    return check_labels(
        npz_vector(path, name), len(_ROW.class_names), where=f"{path}: {name}", obtain=_ROW.obtain
    )
