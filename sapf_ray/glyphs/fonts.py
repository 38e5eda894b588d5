"""From matplotlib's fonts to bitmaps and distance fields."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Left out of both lists: fonts without letters or with fragments only (cmex10, cmsy10, STIXSiz*,
# STIXNonUni*, LastResort, *Display).
PRETRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmtt10",
)
# Never seen in pretraining: they stand in for a sensitive set when hyperparameters are tuned.
# cmmi10 has old-style numerals, the others are true italics.
HELD_OUT_FONTS = ("STIXGeneralBolIta", "STIXGeneralItalic", "cmmi10", "cmti10")

FIELD = 64  # side of a distance field, field pixels
CAP_HEIGHT = 40  # height of a digit in its field, field pixels; the rest is room for the pen

_MAX_WIDTH = 52  # field pixels
_DRAW = 128  # side of the bitmap on which a field is measured, pixels
_FONT_SIZE = 200

# The eight neighbours of a pixel, clockwise from the north: P2..P9 of Zhang & Suen.
_NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


@cache
def font_bank(font: str) -> tuple[np.ndarray, np.ndarray]:
    """Every character of ``CHARACTERS`` in one font.

    Returns:
        Bitmaps uint8 (62, 128, 128) and fields float32 (62, 2, 64, 64): outline, skeleton.

    Raises:
        ValueError: matplotlib does not ship the font.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        known = ", ".join(PRETRAIN_FONTS + HELD_OUT_FONTS)
        raise ValueError(f"fonts: {font!r} is not shipped by matplotlib; known: {known}")
    # Basic layout: identical with and without libraqm on the machine.
    layout = ImageFont.Layout.BASIC
    face = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=layout)
    bitmaps = np.stack([_draw(face, character) for character in CHARACTERS])
    return bitmaps, _fields(bitmaps > 127)


def _fields(filled: np.ndarray) -> np.ndarray:
    """Distances to the outline (signed) and to the skeleton, in field pixels."""
    outlines = []
    for mask in filled:
        outside = distance_transform_edt(~mask)
        inside = distance_transform_edt(mask)
        outlines.append(outside - inside)
    skeletons = [distance_transform_edt(~mask) for mask in skeletonize(filled)]
    both = np.stack([np.stack(outlines), np.stack(skeletons)], axis=1)
    fields = torch.from_numpy(both.astype(np.float32))
    fields = fields * (FIELD / _DRAW)
    return F.avg_pool2d(fields, _DRAW // FIELD).numpy()


def skeletonize(bitmaps: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning of boolean bitmaps (n, h, w) to one-pixel strokes."""
    ink = np.pad(bitmaps.astype(bool), ((0, 0), (1, 1), (1, 1)))
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            removable = _removable(ink, first=first)
            changed |= bool(removable.any())
            ink &= ~removable
    return ink[:, 1:-1, 1:-1]


def _removable(ink: np.ndarray, *, first: bool) -> np.ndarray:
    """Pixels that the first or the second half of a thinning pass takes away."""
    around = [np.roll(ink, (-row, -column), (1, 2)) for row, column in _NEIGHBOURS]
    count = np.sum(around, axis=0)
    following = around[1:] + around[:1]
    rises = np.sum([~a & b for a, b in zip(around, following, strict=True)], axis=0)
    north, east, south, west = around[::2]
    if first:
        corner = ~(north & east & south) & ~(east & south & west)
    else:
        corner = ~(north & east & west) & ~(north & south & west)
    thick = (count >= 2) & (count <= 6)
    return ink & thick & (rises == 1) & corner


def _draw(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One character centred by its box, at the font's own proportions: uint8 (128, 128)."""
    left, top, right, bottom = face.getbbox(character)
    width = round(right - left)
    height = round(bottom - top)
    glyph = Image.new("L", (width, height))
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=face)

    scale = min(_scale(face, character), _MAX_WIDTH / FIELD * _DRAW / width)
    scaled_width = max(1, round(width * scale))
    scaled_height = max(1, round(height * scale))
    scaled = glyph.resize((scaled_width, scaled_height), Image.Resampling.BOX)
    canvas = Image.new("L", (_DRAW, _DRAW))
    corner = ((_DRAW - scaled_width) // 2, (_DRAW - scaled_height) // 2)
    canvas.paste(scaled, corner)
    return np.asarray(canvas)


def _scale(face: ImageFont.FreeTypeFont, character: str) -> float:
    """Factor from the font's pixels to the bitmap's."""
    # Old-style numerals have unequal heights; a written digit fills the line, so each is scaled by
    # its own height. Letters keep their size against the font's capitals: c and C differ by it.
    reference = character if character.isdigit() else "H"
    _, top, _, bottom = face.getbbox(reference)
    return (CAP_HEIGHT / FIELD) * _DRAW / (bottom - top)
