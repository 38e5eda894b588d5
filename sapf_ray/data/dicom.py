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
from dataclasses import dataclass
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
        meaning = _meaning(header)
    except Exception as error:  # elements are parsed where they are first looked at
        kind = type(error).__name__
        raise DataError(f"{name}: cannot be read as an image (damaged DICOM, {kind})") from None
    try:
        return Image.fromarray(_levels(values, meaning, pixel_range=pixel_range))
    except (ValueError, TypeError) as error:  # our own words, or of shapes
        raise DataError(f"{name}: cannot be read as an image ({error})") from None


def n_frames(file: Path | bytes, name: str) -> int:
    """Number of frames that its header states.

    Raises:
        SapfError: pydicom is not installed.
        DataError: Not a DICOM file.
    """
    header = _dataset(file, name, tags=_FRAMES, stop_before_pixels=True)
    try:
        return int(header.get("NumberOfFrames") or 1)
    except Exception:
        raise DataError(f"{name}: cannot be read as an image (damaged DICOM)") from None


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


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    """What a header says of stored values.

    Attributes:
        kind: Photometric interpretation.
        slope: Of rescaling.
        intercept: Of rescaling.
        bits: Number of bits of a value.
        signed: Whether values may be negative.
        has_lut: Whether values pass through a table first.
    """

    kind: str
    slope: float
    intercept: float
    bits: int
    signed: bool
    has_lut: bool


def _meaning(header: Any) -> _Meaning:
    kind = str(header.PhotometricInterpretation)
    bits = int(header.get("BitsStored", 0))
    if kind == _PALETTE:
        bits = int(header.RedPaletteColorLookupTableDescriptor[2])
    home = header
    for key in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        groups = header.get(key)
        if groups and groups[0].get("PixelValueTransformationSequence"):
            home = groups[0].PixelValueTransformationSequence[0]
            break
    slope = home.get("RescaleSlope")
    return _Meaning(
        kind=kind,
        slope=float(1 if slope is None else slope),
        intercept=float(home.get("RescaleIntercept") or 0),
        bits=bits,
        signed=bool(header.get("PixelRepresentation", 0)),
        has_lut="ModalityLUTSequence" in header,
    )


def _levels(
    values: np.ndarray,
    meaning: _Meaning,
    *,
    pixel_range: PixelRange | None,
) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3).

    Raises:
        ValueError: The range of its values is not known; in our own words.
    """
    full = (0.0, 2.0**meaning.bits - 1)
    if meaning.kind == _PALETTE:
        return grey_levels(values, full)
    if meaning.has_lut:
        raise ValueError("its values pass through a modality LUT, which is not read; convert it")
    stored_as_shown = (
        meaning.slope == 1
        and meaning.intercept == 0
        and not meaning.signed
        and values.dtype.kind in "bu"
    )
    known = full if stored_as_shown and 0 < meaning.bits <= 8 else pixel_range
    if known is None:
        raise ValueError(
            "DICOM values of more than 8 bits; set data.pixel_range to those that are black and "
            "white after rescaling, e.g. -1000,400 for CT in Hounsfield units"
        )
    levels = grey_levels(values.astype(np.float64) * meaning.slope + meaning.intercept, known)
    return 255 - levels if meaning.kind == "MONOCHROME1" else levels
