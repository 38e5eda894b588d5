"""Public glyph images: characters drawn from matplotlib's fonts, warped towards handwriting.

The corpus teaches the embedded public model ``glyphs-tiny`` what characters look like. No
sensitive image is read here, or was looked at to choose a range below.

Every glyph is kept as two *distance fields* of 64 x 64 field pixels: the signed distance to its
printed outline, and the distance to its one-pixel skeleton (Zhang & Suen 1984). Stroke width is
then a threshold, so a warp and a pen of any radius cost one ``grid_sample``, and half of the
samples can be monoline pen strokes instead of print.

>>> corpus = GlyphCorpus(PRETRAIN_FONTS, characters="0123456789", seed=0)
>>> images, labels = corpus.render(4)                  # uint8 (4, 1, 32, 32), int64 (4,)
>>> prompt_for("3")
'An image of the digit three'
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
IMAGE_SIDE = 32  # pixels
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Left out of both lists: fonts without letters or with fragments only (cmex10, cmsy10, STIXSiz*,
# STIXNonUni*, LastResort, *Display).
PRETRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmb10", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip
# Never seen in pretraining: they stand in for a sensitive set when hyperparameters are tuned.
# cmmi10 has old-style numerals, the others are true italics.
HELD_OUT_FONTS = ("STIXGeneralBolIta", "STIXGeneralItalic", "cmmi10", "cmti10")

_FIELD = 64  # side of a distance field, field pixels
_DRAW = 128  # side of the bitmap a field is measured on, pixels
_CAP_HEIGHT = 40  # height of a digit in its field, field pixels; the rest is room for the pen
_MAX_WIDTH = 52  # field pixels


@dataclass(frozen=True, kw_only=True)
class GlyphStyle:
    """Ranges (low, high) of the uniform draws that turn a glyph into an image."""

    height: tuple[float, float] = (0.74, 1.02)  # of a digit, in frame heights
    aspect: tuple[float, float] = (0.7, 1.2)  # extra horizontal scale
    rotation: tuple[float, float] = (-12.0, 12.0)  # degrees
    slant: tuple[float, float] = (-0.15, 0.35)  # shear, frame widths per frame height
    shift: float = 0.05  # largest, in frame sides
    elastic: tuple[float, float] = (0.0, 0.1)  # std of the warp's nodes, in half frames
    pen: tuple[float, float] = (1.5, 5.0)  # skeleton pen radius, 1/64 frame
    weight: tuple[float, float] = (-0.3, 3.0)  # outline growth, 1/64 frame
    softness: tuple[float, float] = (1.0, 3.0)  # half width of the ink's edge, 1/64 frame
    ink: tuple[float, float] = (0.7, 1.0)  # brightness
    paper: tuple[float, float] = (0.0, 0.08)  # brightness
    skeleton_share: float = 0.5
    sides: tuple[int, ...] = (8, 8, 8, 10, 12, 16, 24, 32)  # true resolution, drawn uniformly


PUBLIC_STYLE = GlyphStyle()
STAND_IN_STYLE = replace(
    PUBLIC_STYLE, height=(0.88, 1.0), aspect=(0.65, 0.9), slant=(-0.05, 0.3), elastic=(0.06, 0.12),
    pen=(3.0, 5.5), weight=(1.0, 3.5), softness=(2.0, 4.0), sides=(8,),
)  # fmt: skip


def prompt_for(character: str) -> str:
    """Text prompt of one character of ``CHARACTERS``."""
    if len(character) == 1 and character in CHARACTERS:
        if character.isdigit():
            return f"An image of the digit {DIGIT_WORDS[int(character)]}"
        case = "uppercase" if character.isupper() else "lowercase"
        return f"An image of the {case} letter {character}"
    raise ValueError(f"character: {character!r} is not one of {CHARACTERS!r}")


class GlyphCorpus:
    """Endless labelled images of ``characters`` in ``fonts``; a label is an index in
    ``characters``.

    The same arguments, generator state and batch sizes give the same images.
    """

    def __init__(
        self,
        fonts: Sequence[str] | None = None,
        characters: str = CHARACTERS,
        *,
        seed: int = 0,
        style: GlyphStyle = PUBLIC_STYLE,
    ) -> None:
        self.fonts = tuple(PRETRAIN_FONTS if fonts is None else fonts)
        self.characters, self.style = characters, style
        if not self.fonts:
            raise ValueError("fonts: at least one font is needed")
        if not characters or set(characters) - set(CHARACTERS):
            raise ValueError(
                f"characters: {characters!r} must be a non-empty part of {CHARACTERS!r}"
            )
        banks = [_font_bank(font) for font in self.fonts]
        columns = [CHARACTERS.index(c) for c in characters]
        self._bitmaps = np.stack([bitmaps[columns] for bitmaps, _ in banks])
        self._fields = torch.from_numpy(np.stack([fields[columns] for _, fields in banks]))
        # A monospaced zero is dotted or slashed, which is not how the digit is written by hand.
        self._usable = torch.tensor(
            [[float(not ("Mono" in f and c == "0")) for f in self.fonts] for c in characters]
        )
        if not bool((self._usable.sum(1) > 0).all()):
            raise ValueError(f"fonts: none of {self.fonts} has a plain zero")
        self._generator = torch.Generator().manual_seed(seed)

    def corpus_hash(self) -> str:
        """sha256 over font names, characters and base bitmaps: tells whether the corpus changed."""
        digest = hashlib.sha256("\n".join((*self.fonts, self.characters)).encode())
        digest.update(self._bitmaps.tobytes())
        return digest.hexdigest()

    def render(
        self,
        n: int,
        generator: torch.Generator | None = None,
        classes: torch.Tensor | Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``n`` images: uint8 (n, 1, 32, 32), 0 = black, and int64 labels (n,).

        Args:
            generator: source of randomness; the corpus's own (from ``seed``) if None.
            classes: the n labels to draw; uniform over ``characters`` if None.
        """
        if n < 1:
            raise ValueError(f"n: {n} must be at least 1")
        g = self._generator if generator is None else generator
        if classes is None:
            labels = torch.randint(len(self.characters), (n,), generator=g)
        else:
            labels = torch.as_tensor(classes, dtype=torch.int64)
            if labels.shape != (n,):
                raise ValueError(f"classes: shape {tuple(labels.shape)} must be ({n},)")
        images = [self._render_batch(part, g) for part in labels.split(2048)]
        return torch.cat(images), labels

    def _render_batch(self, labels: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        s, n = self.style, len(labels)

        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(n, generator=g)

        font = torch.multinomial(self._usable[labels], 1, generator=g)[:, 0]
        skeleton = torch.rand(n, generator=g) < s.skeleton_share
        field = self._fields[font, labels, skeleton.long()][:, None]

        # Forward map, field to frame: scale, then slant, then rotate, then shift.
        scale_y = uniform(*s.height) * _FIELD / _CAP_HEIGHT
        scale_x = scale_y * uniform(*s.aspect)
        angle, slant = torch.deg2rad(uniform(*s.rotation)), uniform(*s.slant)
        cos, sin = angle.cos(), angle.sin()
        forward = torch.stack(
            [  # y points down: a positive slant leans the top to the right
                torch.stack([cos * scale_x, (-cos * slant - sin) * scale_y], -1),
                torch.stack([sin * scale_x, (-sin * slant + cos) * scale_y], -1),
            ],
            -2,
        )
        shift = torch.stack([uniform(-2 * s.shift, 2 * s.shift) for _ in range(2)], -1)
        grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, 32, 32], align_corners=False)
        nodes = torch.randn(n, 2, 4, 4, generator=g) * uniform(*s.elastic)[:, None, None, None]
        warp = F.interpolate(nodes, IMAGE_SIDE, mode="bicubic", align_corners=True)
        grid = grid + warp.permute(0, 2, 3, 1) - shift[:, None, None]
        grid = torch.einsum("nij,nhwj->nhwi", torch.linalg.inv(forward), grid)
        distance = F.grid_sample(field, grid, padding_mode="border", align_corners=False)[:, 0]

        # Back from field pixels to 1/64 frame, so that the pen does not grow with the glyph.
        distance = distance * (scale_x * scale_y).sqrt()[:, None, None]
        reach = torch.where(skeleton, uniform(*s.pen), uniform(*s.weight))[:, None, None]
        softness = uniform(*s.softness)[:, None, None]
        ink = (0.5 + (reach - distance) / (2 * softness)).clamp(0, 1)[:, None]

        side = torch.tensor(s.sides)[torch.randint(len(s.sides), (n,), generator=g)]
        for low in sorted(set(s.sides) - {IMAGE_SIDE}):
            rows = side == low
            small = F.adaptive_avg_pool2d(ink[rows], low)
            ink[rows] = F.interpolate(small, IMAGE_SIDE, mode="bilinear", align_corners=False)
        # Blurred ink is stretched back to full contrast, as a scanner's levels would be.
        ink = ink / ink.amax((1, 2, 3), keepdim=True).clamp_min(0.3)

        bright, dark = uniform(*s.ink), uniform(*s.paper)
        image = dark[:, None, None, None] + (bright - dark)[:, None, None, None] * ink
        return (image * 255).round().clamp(0, 255).to(torch.uint8)


def stand_in_digits(
    n_train: int, n_test: int, *, seed: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """PUBLIC stand-in for a sensitive digit set: held-out fonts in a style of their own.

    For tuning hyperparameters without a look at sensitive data.

    Returns:
        ``(images, labels)`` for train and for test: uint8 (n, 32, 32, 3), and int64 (n,) in
        0..9, classes balanced to within one image, in random order.
    """
    corpus = GlyphCorpus(HELD_OUT_FONTS, string.digits, seed=seed, style=STAND_IN_STYLE)
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for n in (n_train, n_test):
        classes = torch.arange(n)[torch.randperm(n, generator=generator)] % 10
        images, labels = corpus.render(n, generator, classes)
        splits.append((images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy(), labels.numpy()))
    return splits[0], splits[1]


def skeletonize(bitmaps: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning of boolean bitmaps (n, h, w) to one-pixel strokes."""
    ink = np.pad(bitmaps.astype(bool), ((0, 0), (1, 1), (1, 1)))
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            # Neighbours clockwise from the north, P2..P9 in the paper.
            rows, cols = (-1, -1, 0, 1, 1, 1, 0, -1), (0, 1, 1, 1, 0, -1, -1, -1)
            around = [np.roll(ink, (-r, -c), (1, 2)) for r, c in zip(rows, cols, strict=True)]
            count = np.sum(around, axis=0)
            rises = np.sum(
                [~a & b for a, b in zip(around, around[1:] + around[:1], strict=True)], 0
            )
            north, east, south, west = around[::2]
            if first:
                corner = ~(north & east & south) & ~(east & south & west)
            else:
                corner = ~(north & east & west) & ~(north & south & west)
            remove = ink & (count >= 2) & (count <= 6) & (rises == 1) & corner
            changed |= bool(remove.any())
            ink &= ~remove
    return ink[:, 1:-1, 1:-1]


@cache
def _font_bank(font: str) -> tuple[np.ndarray, np.ndarray]:
    """Bitmaps uint8 (62, 128, 128) and fields float32 (62, 2, 64, 64): outline, skeleton."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        known = ", ".join(PRETRAIN_FONTS + HELD_OUT_FONTS)
        raise ValueError(f"fonts: {font!r} is not shipped by matplotlib; known: {known}")
    # Basic layout: identical with and without libraqm on the machine.
    face = ImageFont.truetype(str(path), 200, layout_engine=ImageFont.Layout.BASIC)
    bitmaps = np.stack([_draw(face, c) for c in CHARACTERS])
    filled = bitmaps > 127
    to_field = _FIELD / _DRAW
    outline = np.stack([distance_transform_edt(~m) - distance_transform_edt(m) for m in filled])
    bones = skeletonize(filled)
    skeleton = np.stack([distance_transform_edt(~m) for m in bones])
    fields = torch.from_numpy(np.stack([outline, skeleton], 1).astype(np.float32)) * to_field
    return bitmaps, F.avg_pool2d(fields, _DRAW // _FIELD).numpy()


def _draw(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One character centred by its box, at the font's own proportions: uint8 (128, 128)."""
    # Old-style numerals have unequal heights; a written digit fills the line, so each is scaled by
    # its own height. Letters keep their size against the font's capitals: c and C differ by it.
    left, top, right, bottom = face.getbbox(character)
    _, cap_top, _, cap_bottom = face.getbbox(character if character.isdigit() else "H")
    scale = (_CAP_HEIGHT / _FIELD) * _DRAW / (cap_bottom - cap_top)
    width, height = round(right - left), round(bottom - top)
    scale = min(scale, (_MAX_WIDTH / _FIELD) * _DRAW / width)
    glyph = Image.new("L", (width, height))
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=face)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    canvas = Image.new("L", (_DRAW, _DRAW))
    canvas.paste(
        glyph.resize(size, Image.Resampling.BOX), ((_DRAW - size[0]) // 2, (_DRAW - size[1]) // 2)
    )
    return np.asarray(canvas)
