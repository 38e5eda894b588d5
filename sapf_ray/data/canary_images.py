"""Crafted images among a source's training images, for a black-box audit of a run.

Each of n canaries has a place behind the source's own records, so N is known whichever coins fall;
one whose coin says out is read as a record that cannot be read, and counts for nothing. Canaries
are unlike any real image, mosaics of random colours, and known to the attacker; the coins are not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sapf_ray.data.base import SKIPPED, SPLITS, ImageSource, Split, check_indices
from sapf_ray.files import atomic_file, short_hash

if TYPE_CHECKING:
    import numpy as np

    from sapf_ray.data.findings import Findings

TILES = 8  # a side


class CanaryImages(ImageSource):
    """A source with canaries behind its training images.

    Args:
        source: The sensitive images.
        count: Number of canaries.
        coins: File of the coins; made, secret, when a record is first asked for.
    """

    can_skip = True

    def __init__(self, source: ImageSource, *, count: int, coins: Path) -> None:
        self.source, self.count, self._file = source, count, coins
        self.name, self.resolution = source.name, source.resolution
        self.class_names, self.prompts = source.class_names, source.prompts
        self.n_train, self.n_test = source.n_train + count, source.n_test

    def coins(self) -> np.ndarray:
        """Whether each canary is in, bool (count,)."""
        import numpy as np

        if not self._file.exists():
            fresh = np.unpackbits(np.frombuffer(os.urandom(self.count), np.uint8))[: self.count]
            self._file.parent.mkdir(exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                with atomic_file(self._file, mode=0o600, replace=False) as file:
                    np.save(file, fresh.astype(bool))
        return np.load(self._file)

    def read(
        self, split: Split, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        if split != "train":
            return self.source.read(split, indices, resolution=resolution)
        indices = check_indices(indices, self.n_train, split=split)
        own = indices < self.source.n_train
        images = np.zeros((len(indices), resolution, resolution, 3), np.uint8)
        labels = np.full(len(indices), SKIPPED, np.int64)
        if own.any():
            images[own], labels[own] = self.source.read(split, indices[own], resolution=resolution)
        places = indices[~own] - self.source.n_train
        if len(places):
            present = self.coins()[places]
            crafted, classes = self.crafted(places, resolution=resolution)
            images[~own] = np.where(present[:, None, None, None], crafted, 0)
            labels[~own] = np.where(present, classes, SKIPPED)
        return images, labels

    def crafted(self, places: np.ndarray, *, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """Canaries, in or not: images uint8 (n, R, R, 3) and labels int64 (n,); public."""
        import numpy as np

        rows = np.arange(resolution) * TILES // resolution
        images = [
            np.random.default_rng([2718, int(place)]).integers(0, 256, (TILES, TILES, 3))[rows][
                :, rows
            ]
            for place in places
        ]
        return np.array(images, np.uint8), np.asarray(places) % len(self.class_names)

    def labels(self, split: Split) -> np.ndarray:
        import numpy as np

        own = self.source.labels(split)
        if split != "train":
            return own
        classes = np.arange(self.count) % len(self.class_names)
        return np.concatenate([own, np.where(self.coins(), classes, SKIPPED)])

    def fingerprint(self) -> str:
        return short_hash([self.source.fingerprint(), self.coins().tolist()], digits=64)

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        self.source.verify(splits)

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        return self.source.inspect(splits)

    def notes(self) -> tuple[str, ...]:
        return self.source.notes()

    def file_bytes(self) -> int:
        return self.source.file_bytes()
