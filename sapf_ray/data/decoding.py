"""Decoding one image file or one array of pixels to a square RGB image.

Every source resizes alike: shorter side to the resolution, centre crop, Pillow's antialiased
bilinear filter, the filter with which evaluation resizes synthetic images.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sapf_ray.errors import DataError, reason

# What PIL raises on damaged files, by format; UnidentifiedImageError is an OSError.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    Image.DecompressionBombError,
)


def decode(
    file: Path | bytes,
    resolution: int,
    *,
    name: str | None = None,
) -> np.ndarray:
    """One image file as uint8 (R, R, 3).

    Args:
        file: Path of the file, or its content.
        resolution: Side R in pixels.
        name: What an error calls the image; by default the path.

    Raises:
        DataError: Not an image, truncated or gone; names it.
    """
    readable = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(readable) as image:
            upright = ImageOps.exif_transpose(image)
            return _square(_to_rgb(upright), resolution)
    except UNREADABLE as error:
        message = unreadable_message(name or str(file), error)
        raise DataError(message) from error


def decode_pixels(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Pixels uint8 (H, W) or (H, W, 3) as uint8 (R, R, 3)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _square(image.convert("RGB"), resolution)


def _square(image: Image.Image, resolution: int) -> np.ndarray:
    size = (resolution, resolution)
    fitted = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL clips 16-bit greys at 255 instead of scaling them.
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def unreadable_message(name: str, error: Exception) -> str:
    """The one line that names an image and says why it cannot be read."""
    why = reason(error).replace(f" '{name}'", "")
    return f"{name}: cannot be read as an image ({why})"
