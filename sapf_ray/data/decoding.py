"""Decoding one image file or one array of pixels to a square RGB image.

Every source resizes alike: shorter side to the resolution, centre crop, Pillow's antialiased
bilinear filter, the filter with which evaluation resizes synthetic images. Of several frames or
pages the first is read; colour profiles are not applied.

**Pixels of more than 8 bits.** Which values mean black and white, such files mostly do not say: a
12-bit scan stored in 16 bits would be read as nearly black. The range is the user's to give, as
``data.pixel_range``; it is public, since taking it from the images would be a release. Formats
whose header states it (PGM, JPEG 2000) need none.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sapf_ray.data.dicom import dicom_image, is_dicom
from sapf_ray.data.formats import readable_formats
from sapf_ray.data.pixels import PixelRange, grey_levels
from sapf_ray.data.walking import shown
from sapf_ray.errors import DataError, reason

# Large scans are wanted; what is larger still is refused as an error. Here rather than where files
# are opened, since threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FULL_16_BITS: PixelRange = (0.0, 65535.0)

_STATES_ITS_RANGE = {"PPM", "JPEG2000"}  # Pillow scales these to the full 16 bits
_INVERTED = 0  # TIFF's PhotometricInterpretation "white is zero"
_PHOTOMETRIC = 262


def decode(
    file: Path | bytes,
    resolution: int,
    *,
    name: str | None = None,
    pixel_range: PixelRange | None = None,
) -> np.ndarray:
    """One image file as uint8 (R, R, 3).

    Args:
        file: Path of the file, or its content.
        resolution: Side R in pixels.
        name: What an error calls the image; by default the path.
        pixel_range: Values shown black and white, for pixels of more than 8 bits.

    Raises:
        DataError: Not an image, truncated or gone, or its pixels need a range; names it.
    """
    if is_dicom(file):
        shown_name = name or shown(str(file))
        return _square(
            dicom_image(file, shown_name, pixel_range=pixel_range).convert("RGB"), resolution
        )
    with opened(file, name=name) as image:
        return _square(to_rgb(image, pixel_range), resolution)


@contextmanager
def opened(file: Path | bytes, *, name: str | None = None) -> Iterator[Image.Image]:
    """The image, opened by its content whatever its ending; its pixels are not yet decoded.

    Raises:
        DataError: Not an image; or whatever went wrong inside the ``with``. Names the image.
    """
    readable = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(readable, formats=readable_formats()) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on damaged files
        message = unreadable_message(name or shown(str(file)), error)
        raise DataError(message) from error


def check_depth(image: Image.Image, pixel_range: PixelRange | None) -> None:
    """Refuses pixels of more than 8 bits whose range is not known; decodes nothing.

    Raises:
        ValueError: In one line.
    """
    if image.format in _STATES_ITS_RANGE:
        return
    if _is_deep(image.mode):
        if pixel_range is None:
            raise ValueError(
                f"{_depth_text(image.mode)}; set data.pixel_range to the values that are black "
                "and white, e.g. 0,4095 for 12 bits"
            )
    elif _is_cut_to_8_bits(image) and pixel_range != FULL_16_BITS:
        raise ValueError(
            "colours of 16 bits, of which the upper 8 are read; "
            "set data.pixel_range=0,65535 if they use the whole range, else convert it"
        )


def decode_pixels(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Pixels uint8 (H, W) or (H, W, 3) as uint8 (R, R, 3)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _square(image.convert("RGB"), resolution)


def _square(image: Image.Image, resolution: int) -> np.ndarray:
    size = (resolution, resolution)
    fitted = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def to_rgb(image: Image.Image, pixel_range: PixelRange | None) -> Image.Image:
    """Decoded, upright, over white where it is transparent.

    Raises:
        ValueError: Its pixels need a range, see :func:`check_depth`; or whatever Pillow raises.
    """
    check_depth(image, pixel_range)
    image.load()
    deep = _is_deep(image.mode)
    grey = _grey(image, pixel_range) if deep else None
    image = _upright(image, grey)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey(image: Image.Image, pixel_range: PixelRange | None) -> Image.Image:
    """A deep image in 8 bits; it takes the orientation along."""
    known = FULL_16_BITS if image.format in _STATES_ITS_RANGE else pixel_range
    assert known is not None, "check_depth comes first"
    levels = grey_levels(np.asarray(image), known)
    if _is_negative(image):
        levels = 255 - levels
    return Image.fromarray(levels)


def _upright(image: Image.Image, pixels: Image.Image | None) -> Image.Image:
    """The image, or other pixels of it, turned as its EXIF says."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block leaves the image as it is stored
        orientation = 1
    shown = image if pixels is None else pixels
    turn = _TURNS.get(orientation)
    return shown if turn is None else _transposed(shown, turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _transposed(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    turned = image.transpose(turn)
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # rarely needed

    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None, "only None where it works in place"
    return converted


def _is_deep(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _depth_text(mode: str) -> str:
    kinds = {"F": "float pixels", "I": "integer pixels of more than 8 bits"}
    return kinds.get(mode, "pixels of 16 bits")


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether Pillow keeps the upper 8 bits of 16; the raw mode of its decoder says so."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if arguments and isinstance(arguments[0], str) and ";16" in arguments[0]:
            return True
    return False


def _is_negative(image: Image.Image) -> bool:
    """Whether a deep TIFF stores white as zero, which Pillow inverts for 8 bits only."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRIC) == _INVERTED


def unreadable_message(name: str, error: Exception) -> str:
    """The one line that names an image and says why it cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        why = "cannot identify image file"
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror
    elif isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        why = f"more than {most:,} pixels; scale it down"
    else:
        why = reason(error)
    return f"{name}: cannot be read as an image ({why})"
