"""Sources of sensitive images: one file of :mod:`sapf_ray.data.sources` each."""

from __future__ import annotations

from sapf_ray.data.base import SOURCES, ImageSource, Split, open_source

__all__ = ["SOURCES", "ImageSource", "Split", "open_source"]
