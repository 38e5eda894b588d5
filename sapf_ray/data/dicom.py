"""The image of a DICOM file, read through pydicom (``pip install 'sapf-ray[dicom]'``).

Only the elements that describe pixels are parsed, and no message of pydicom is passed on: both may
hold what identifies a patient. Values are those after rescale slope and intercept (Hounsfield units
in CT). Which of them are black and white ``data.pixel_range`` says; the windows that files suggest
are not applied, since they differ from file to file. Pixels of at most 8 bits without rescaling are
shown as they are. MONOCHROME1 is inverted; of several frames the first is read.
Source: DICOM PS3.3 C.7.6.3 (image pixel) and C.11.1 (modality LUT).
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sapf_ray.data.formats import DICOM_ENDINGS
from sapf_ray.data.pixels import PixelRange, grey_levels
from sapf_ray.errors import DataError, SapfError

_PREAMBLE = 128
_MAGIC = b"DICM"
_PALETTE = "PALETTE COLOR"

_FRAMES = ("NumberOfFrames",)
_PIXELS = (
    *_FRAMES,
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)


def is_dicom(file: Path | bytes) -> bool:
    """By its ending; without a known one, as in many archives, by its first bytes."""
    if isinstance(file, bytes):
        return file[_PREAMBLE : _PREAMBLE + len(_MAGIC)] == _MAGIC
    ending = file.suffix.lower()
    if ending in DICOM_ENDINGS:
        return True
    if ending.strip(".0123456789"):  # names may end in a number of a UID
        return False
    try:
        with file.open("rb") as opened:
            return is_dicom(opened.read(_PREAMBLE + len(_MAGIC)))
    except OSError:
        return False


def dicom_image(file: Path | bytes, name: str, *, pixel_range: PixelRange | None) -> Image.Image:
    """The first frame, as a grey or RGB image of 8 bits.

    Raises:
        SapfError: pydicom is not installed.
        DataError: Damaged, without pixels, compressed as nothing here reads, or its pixels need a
            range; names the image and quotes nothing of it.
    """
    values, header = _read(file, name)
    try:
        return Image.fromarray(_levels(values, header, pixel_range=pixel_range))
    except ValueError as error:  # our own words
        raise DataError(f"{name}: cannot be read as an image ({error})") from None


def n_frames(file: Path | bytes, name: str) -> int:
    """Number of frames that its header states.

    Raises:
        SapfError: pydicom is not installed.
        DataError: Not a DICOM file.
    """
    header = _dataset(file, name, tags=_FRAMES, stop_before_pixels=True)
    return int(header.get("NumberOfFrames") or 1)


def _read(file: Path | bytes, name: str) -> tuple[np.ndarray, Any]:
    """Stored values of the first frame, colours as RGB, and the elements beside them."""
    header = _dataset(file, name, tags=_PIXELS, stop_before_pixels=False)
    from pydicom.pixels import apply_color_lut, pixel_array

    if not any(key in header for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(f"{name}: cannot be read as an image (a DICOM file without pixels)")
    try:
        values = pixel_array(header, index=0)
        if header.PhotometricInterpretation == _PALETTE:
            values = apply_color_lut(values, header)
    except (RuntimeError, NotImplementedError):
        syntax = header.file_meta.TransferSyntaxUID.name
        raise DataError(
            f"{name}: cannot be read as an image (compressed as {syntax}, which needs a decoder: "
            "pip install pylibjpeg pylibjpeg-libjpeg, or convert it)"
        ) from None
    except Exception as error:  # whatever a damaged file leads to
        kind = type(error).__name__
        raise DataError(f"{name}: cannot be read as an image (damaged DICOM, {kind})") from None
    return values, header


def _dataset(
    file: Path | bytes,
    name: str,
    *,
    tags: tuple[str, ...],
    stop_before_pixels: bool,
) -> Any:
    try:
        import pydicom
    except ImportError:
        raise SapfError(
            f"{name}: a DICOM file, which pydicom reads; pip install 'sapf-ray[dicom]'"
        ) from None
    _silence(pydicom)
    readable = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return pydicom.dcmread(
            readable, specific_tags=list(tags), stop_before_pixels=stop_before_pixels
        )
    except OSError as error:
        why = error.strerror or "cannot be opened"
    except pydicom.errors.InvalidDicomError:
        why = "not a DICOM file"
    except Exception as error:
        why = f"damaged DICOM, {type(error).__name__}"
    raise DataError(f"{name}: cannot be read as an image ({why})")


def _silence(pydicom: Any) -> None:
    """Its warnings quote values of elements."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


warnings.filterwarnings("ignore", module=r"pydicom\.")
warnings.filterwarnings("ignore", module=r"sapf_ray\.data\.dicom")


def _levels(
    values: np.ndarray,
    header: Any,
    *,
    pixel_range: PixelRange | None,
) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3).

    Raises:
        ValueError: The range of its values is not known; in our own words.
    """
    kind = header.PhotometricInterpretation
    if kind == _PALETTE:
        bits = int(header.RedPaletteColorLookupTableDescriptor[2])
        return grey_levels(values, (0.0, 2.0**bits - 1))
    if "ModalityLUTSequence" in header:
        raise ValueError("its values pass through a modality LUT, which is not read; convert it")
    slope, intercept = _rescale(header)
    stored = int(header.get("BitsStored", 0))
    signed = bool(header.get("PixelRepresentation", 0))
    plain = slope == 1 and intercept == 0 and not signed and values.dtype.kind in "bu"
    if plain and stored <= 8:
        known: PixelRange | None = (0.0, 2.0**stored - 1)
    else:
        known = pixel_range
    if known is None:
        raise ValueError(
            "DICOM values of more than 8 bits; set data.pixel_range to those that are black and "
            "white after rescaling, e.g. -1000,400 for CT in Hounsfield units"
        )
    levels = grey_levels(values.astype(np.float64) * slope + intercept, known)
    return 255 - levels if kind == "MONOCHROME1" else levels


def _rescale(header: Any) -> tuple[float, float]:
    """Slope and intercept: of the file, or of the first frame where they are kept per frame."""
    home = header
    for key in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        groups = header.get(key)
        if groups and groups[0].get("PixelValueTransformationSequence"):
            home = groups[0].PixelValueTransformationSequence[0]
            break
    slope = home.get("RescaleSlope")
    intercept = home.get("RescaleIntercept")
    return float(1 if slope is None else slope), float(intercept or 0)
