"""Sources of sensitive images. Importing the package fills the table of sources."""

from __future__ import annotations

from sapf_ray.data.base import SOURCES, ImageSource, Split, open_source
from sapf_ray.data.sources import (  # noqa: F401  (each enters itself in SOURCES)
    camelyon,
    celeba,
    cifar10,
    digits,
    image_folder,
    octmnist,
    parquet,
    stand_in,
)

__all__ = ["SOURCES", "ImageSource", "Split", "open_source"]
