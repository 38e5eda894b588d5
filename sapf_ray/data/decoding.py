"""Decoding one image file or one array of pixels to a square RGB image.

Every source resizes alike: shorter side to the resolution, centre crop, Pillow's antialiased
bilinear filter, the filter with which evaluation resizes synthetic images.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sapf_ray.errors import DataError

# What PIL raises on damaged files, by format; UnidentifiedImageError is an OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def decode(file: Path | bytes, resolution: int, name: str | None = None) -> np.ndarray:
    """One image file as uint8 (R, R, 3).

    Args:
        file: Its path, or its content.
        name: What an error calls it; by default the path.

    Raises:
        DataError: Not an image, truncated or gone; names it.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _square(_to_rgb(ImageOps.exif_transpose(image)), resolution)
    except UNREADABLE as error:
        raise DataError(unreadable_message(name or str(file), error)) from error


def decode_pixels(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Pixels uint8 (H, W) or (H, W, 3) as uint8 (R, R, 3)."""
    return _square(Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB"), resolution)


def _square(image: Image.Image, resolution: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BILINEAR))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL clips 16-bit greys at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def unreadable_message(name: str, error: Exception) -> str:
    """The one line that names an image and says why it cannot be read."""
    reason = (
        str(error).splitlines()[0].replace(f" '{name}'", "") if str(error) else type(error).__name__
    )
    return f"{name}: cannot be read as an image ({reason})"
