"""A data set all of which is a test set: images that no run was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapf_ray.data.base import SPLITS, ImageSource, check_indices
from sapf_ray.data.findings import Findings, Split
from sapf_ray.errors import ConfigError


class WholeSource(ImageSource):
    """Both splits of a source as its test split; it has no training images.

    Args:
        source: The source as it is.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.name = source.name
        self.class_names = source.class_names
        self.prompts = source.prompts
        self.resolution = source.resolution
        self.n_train = 0
        self.n_test = source.n_train + source.n_test

    def read(
        self, split: Split, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check(split)
        indices = check_indices(indices, self.n_test, split=split)
        images = np.empty((len(indices), resolution, resolution, 3), np.uint8)
        labels = np.empty(len(indices), np.int64)
        first = indices < self.source.n_train
        for part, rows, start in (("train", first, 0), ("test", ~first, self.source.n_train)):
            if rows.any():
                images[rows], labels[rows] = self.source.read(
                    part,  # type: ignore[arg-type]
                    indices[rows] - start,
                    resolution=resolution,
                )
        return images, labels

    def labels(self, split: Split) -> np.ndarray:
        self._check(split)
        return np.concatenate([self.source.labels(part) for part in SPLITS])

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        self.source.verify(SPLITS)

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        return self.source.inspect(SPLITS)

    def notes(self) -> tuple[str, ...]:
        return self.source.notes()

    def _check(self, split: Split) -> None:
        if split == "train":
            raise ConfigError(
                "evaluation.test_images",
                "all",
                "leaves no training images, which a score asks for; must be split",
            )
