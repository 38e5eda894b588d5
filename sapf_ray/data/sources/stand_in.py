"""Public stand-in for a sensitive digit set: fonts that pretraining never saw, in a style of their
own.

For choosing hyperparameters without touching, or paying for, the sensitive images.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import CATALOG, DIGITS_TEST, DIGITS_TRAIN
from sapf_ray.glyphs import stand_in_digits

_rendered = lru_cache(maxsize=1)(lambda: stand_in_digits(DIGITS_TRAIN, DIGITS_TEST))


@register("stand_in")
class StandIn(ImageSource):
    """As many records, classes and prompts as ``digits``, all of it public."""

    def __init__(self, config: DataConfig) -> None:
        self.class_names = CATALOG["stand_in"].class_names
        self.prompts = CATALOG["stand_in"].prompts
        self.n_train = DIGITS_TRAIN
        self.n_test = DIGITS_TEST

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        images, labels = _rendered()[0 if split == "train" else 1]
        rows = check_indices(indices, len(labels), split=split)
        size = (resolution, resolution)
        resized = [
            np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            for image in images[rows]
        ]
        return np.stack(resized), labels[rows]

    def labels(self, split: Split) -> np.ndarray:
        return _rendered()[0 if split == "train" else 1][1]

    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(_rendered()[0][0]).tobytes()).hexdigest()

    def verify(self) -> None:
        """Nothing to look for: the records are rendered."""
