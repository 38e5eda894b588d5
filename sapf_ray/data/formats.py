"""Which image files are read: what the installed Pillow reads, asked of its own registry.

>>> {".png", ".tif", ".gif", ".jfif", ".jp2", ".pcx", ".ppm"} <= readable_endings()
True
>>> ".pdf" in readable_endings() or ".eps" in readable_endings()
False
"""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageFile

DICOM_ENDINGS = frozenset({".dcm", ".dicom"})
"""Endings of files that pydicom reads."""

_NOT_READ = {
    "EPS": "would be drawn by Ghostscript, a program that the file then controls",
    "MPEG": "is identified by Pillow, but not decoded",
}


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes, in the order in which it tries them."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ and not _is_stub(name))


@lru_cache(maxsize=1)
def readable_endings() -> frozenset[str]:
    """Endings of the files in these formats, lower case with the dot."""
    formats = {*readable_formats(), "MPO"}  # which Pillow opens as JPEG
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, name in endings if name in formats)


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Endings of all files that are images."""
    return readable_endings() | DICOM_ENDINGS


def endings_text() -> str:
    """Half a sentence for error messages."""
    return f".jpg .png .tif and {len(readable_endings()) - 3} more endings that Pillow reads"


def _is_stub(name: str) -> bool:
    """Whether Pillow only recognises the format and leaves decoding to others."""
    factory = Image.OPEN[name][0]
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
