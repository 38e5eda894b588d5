"""Public stand-in for a sensitive digit set.

Fonts that pretraining never saw, in a style of their own: for choosing hyperparameters without
touching, or paying for, the sensitive images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import DATA_SETS, DIGITS_TEST, DIGITS_TRAIN


@register("stand_in")
class StandIn(ImageSource):
    """As many records, classes and prompts as ``digits``, all of it public."""

    row = DATA_SETS["stand_in"]

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
        images, labels = _rendered()[split]
        rows = check_indices(indices, len(labels), split=split)
        size = (resolution, resolution)
        resized = np.empty((len(rows), *size, 3), dtype=np.uint8)
        for i, row in enumerate(rows):
            image = Image.fromarray(images[row])
            resized[i] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        return resized, labels[rows]

    def labels(self, split: Split) -> np.ndarray:
        _, labels = _rendered()[split]
        return labels

    def fingerprint(self) -> str:
        images, _ = _rendered()["train"]
        return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Nothing to look for: the records are rendered."""


@lru_cache(maxsize=1)
def _rendered() -> dict[Split, tuple[np.ndarray, np.ndarray]]:
    from sapf_ray.glyphs import stand_in_digits  # torch and matplotlib take over a second

    train, test = stand_in_digits(DIGITS_TRAIN, DIGITS_TEST)
    return {"train": train, "test": test}
