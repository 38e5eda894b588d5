"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship inside a dependency."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import CATALOG, DIGITS_TEST, DIGITS_TRAIN

SPLIT_SEED = 20240601  # fixes which digits are test records; never changes


@register("digits")
class Digits(ImageSource):
    """Light ink on dark ground, resized bilinearly; split by a constant permutation, whatever the
    data.
    """

    def __init__(self, config: DataConfig) -> None:
        self.class_names = CATALOG["digits"].class_names
        self.prompts = CATALOG["digits"].prompts
        self.n_train = DIGITS_TRAIN
        self.n_test = DIGITS_TEST

    def _records(self, split: Split) -> np.ndarray:
        """Row numbers of a split in scikit-learn's own order."""
        order = np.random.RandomState(SPLIT_SEED).permutation(DIGITS_TRAIN + DIGITS_TEST)
        return order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = _load()
        rows = self._records(split)
        rows = rows[check_indices(indices, len(rows), split=split)]
        images = np.empty((len(rows), resolution, resolution, 3), dtype=np.uint8)
        for i, row in enumerate(rows):
            resized = Image.fromarray(pixels[row]).resize(
                (resolution, resolution), Image.Resampling.BILINEAR
            )
            images[i] = np.asarray(resized)[:, :, None]
        return images, labels[rows]

    def labels(self, split: Split) -> np.ndarray:
        return _load()[1][self._records(split)]

    def fingerprint(self) -> str:
        pixels, labels = _load()
        return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()

    def verify(self) -> None:
        """Nothing to look for: the records come with scikit-learn."""


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (1797, 8, 8) scaled to 0..255 and labels int64 (1797,); takes about 10 ms."""
    from sklearn.datasets import load_digits  # importing scikit-learn takes a second

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)
