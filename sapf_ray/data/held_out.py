"""A source without the images that the trials of a private choice are scored on.

Which images are held out is drawn once for all trials, from a secret key and not from the images,
and as many whatever they are: adding or removing a record moves no other from one part to the
other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sapf_ray.data.base import SPLITS, ImageSource, Split, check_indices
from sapf_ray.errors import DataError, reason
from sapf_ray.files import short_hash, write_array

if TYPE_CHECKING:
    import numpy as np

    from sapf_ray.data.findings import Findings
    from sapf_ray.privacy.keyed_rng import NoiseKey


def draw_split(path: Path, n_images: int, held_out: int, *, key: NoiseKey) -> None:
    """Writes which images are held out, mode 0600: each set of that size is equally likely.

    Args:
        path: Of the file.
        n_images: Number of all training images.
        held_out: How many of them are held out.
        key: Secret.
    """
    import numpy as np

    order = np.argsort(key.stream("held out").words(n_images), kind="stable")
    write_array(path, np.sort(order[:held_out]).astype(np.int64), mode=0o600)


class WithoutHeldOut(ImageSource):
    """The images that a trial learns from.

    Args:
        source: All images; without groups.
        held_out: How many of its training images are held out.
        split: File that says which, from :func:`draw_split`; read when an image is asked for.
    """

    def __init__(self, source: ImageSource, *, held_out: int, split: Path) -> None:
        self.source, self.n_held_out, self._file = source, held_out, split
        self.name, self.resolution = source.name, source.resolution
        self.can_skip = source.can_skip
        self.class_names, self.prompts = source.class_names, source.prompts
        self.n_train, self.n_test = source.n_train - held_out, source.n_test

    @property
    def whole(self) -> ImageSource:
        return self.source.whole

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """Positions among all training images, int64 ascending.

        Raises:
            DataError: The file is gone, or of other images.
        """
        import numpy as np

        try:
            found = np.load(self._file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._file}: says which images are held out, and cannot be read "
                f"({reason(error)}); a choice that is over cannot be continued"
            ) from error
        if len(found) != self.n_held_out or found.max() >= self.source.n_train:
            raise DataError(f"{self._file}: was drawn for another number of images")
        return found

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """Positions of the others among all training images, int64 ascending."""
        import numpy as np

        return np.setdiff1d(np.arange(self.source.n_train), self.held_out)

    def read(
        self, split: Split, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if split == "train":
            indices = self.kept[check_indices(indices, self.n_train, split=split)]
        return self.source.read(split, indices, resolution=resolution)

    def labels(self, split: Split) -> np.ndarray:
        labels = self.source.labels(split)
        return labels[self.kept] if split == "train" else labels

    def fingerprint(self) -> str:
        return short_hash([self.source.fingerprint(), self.held_out.tolist()], digits=64)

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        self.source.verify(splits)

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        return self.source.inspect(splits)

    def notes(self) -> tuple[str, ...]:
        return self.source.notes()

    def file_bytes(self) -> int:
        return self.source.file_bytes()
