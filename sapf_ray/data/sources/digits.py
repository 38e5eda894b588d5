"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship inside a dependency."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import DATA_SETS, DIGITS_TEST, DIGITS_TRAIN

SPLIT_SEED = 20240601  # fixes which digits are test records; never changes


@register("digits")
class Digits(ImageSource):
    """Light ink on dark ground, resized bilinearly.

    The split is a constant permutation, whatever the data.
    """

    row = DATA_SETS["digits"]
    resolution = 32  # the bundled models' side: networks tell little from 8 pixels

    def __init__(self, config: DataConfig) -> None:
        self.class_names = self.row.class_names
        self.prompts = self.row.prompts
        self.n_train = DIGITS_TRAIN
        self.n_test = DIGITS_TEST

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = _load()
        members = self._records(split)
        rows = members[check_indices(indices, len(members), split=split)]
        size = (resolution, resolution)
        images = np.empty((len(rows), *size, 3), dtype=np.uint8)
        for i, row in enumerate(rows):
            digit = Image.fromarray(pixels[row])
            resized = digit.resize(size, Image.Resampling.BILINEAR)
            images[i] = np.asarray(resized)[:, :, None]
        return images, labels[rows]

    def labels(self, split: Split) -> np.ndarray:
        _, labels = _load()
        return labels[self._records(split)]

    def fingerprint(self) -> str:
        pixels, labels = _load()
        content = pixels.tobytes() + labels.tobytes()
        return hashlib.sha256(content).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Nothing to look for: the records come with scikit-learn."""

    def _records(self, split: Split) -> np.ndarray:
        """Row numbers of a split in scikit-learn's own order."""
        random = np.random.RandomState(SPLIT_SEED)
        order = random.permutation(DIGITS_TRAIN + DIGITS_TEST)
        return order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (1797, 8, 8) scaled to 0..255 and labels int64 (1797,); takes about 10 ms."""
    from sklearn.datasets import load_digits  # importing scikit-learn takes a second

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16))
    return pixels.astype(np.uint8), bunch.target.astype(np.int64)
