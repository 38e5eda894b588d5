"""Which images a source holds, whatever file, path or label they are found under."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sapf_ray.data.base import ImageSource
from sapf_ray.data.canary_images import CanaryImages

if TYPE_CHECKING:
    import numpy as np

LOOKED_AT = 1024
"""Images that are decoded for it, as many as are checked before a run (seconds at most)."""
SIDE = 32
"""Pixels of the side at which they are compared."""


def images_digest(source: ImageSource) -> str:
    """SHA-256 of the training images by their pixels, hex; sensitive, for a guess can be tested.

    Of up to :data:`LOOKED_AT` images all are looked at, of more as many, evenly spread. Their order
    does not count unless there are more, nor do paths, names, times, labels and groups. A set that
    differs in one image has, as a rule, another digest. An audit's canaries are left out, and the
    images that a trial of a private choice holds out are not.

    Args:
        source: The sensitive images.

    Raises:
        DataError: An image cannot be read; names its path.
    """
    import numpy as np

    if isinstance(source, CanaryImages):
        source = source.source
    source = source.whole
    count = min(source.n_train, LOOKED_AT)
    places = np.arange(count) * source.n_train // count
    found = []
    for start in range(0, count, 64):  # a batch at a time: memory stays small
        images, _ = source.read("train", places[start : start + 64], resolution=SIDE)
        found += [_digest(image) for image in images]
    return hashlib.sha256(b"".join([str(source.n_train).encode(), *sorted(found)])).hexdigest()


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
