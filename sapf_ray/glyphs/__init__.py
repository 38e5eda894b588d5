"""Public glyph images: characters drawn from matplotlib's fonts, warped towards handwriting.

The corpus teaches the embedded public model ``glyphs-tiny`` what characters look like. No
sensitive image is read here, or was looked at to choose a range.

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

from sapf_ray.glyphs.corpus import GlyphCorpus, prompt_for, stand_in_digits
from sapf_ray.glyphs.fonts import (
    CHARACTERS,
    DIGIT_WORDS,
    HELD_OUT_FONTS,
    PRETRAIN_FONTS,
    skeletonize,
)
from sapf_ray.glyphs.rendering import IMAGE_SIDE, PUBLIC_STYLE, STAND_IN_STYLE, GlyphStyle

__all__ = [
    "CHARACTERS",
    "DIGIT_WORDS",
    "HELD_OUT_FONTS",
    "IMAGE_SIDE",
    "PRETRAIN_FONTS",
    "PUBLIC_STYLE",
    "STAND_IN_STYLE",
    "GlyphCorpus",
    "GlyphStyle",
    "prompt_for",
    "skeletonize",
    "stand_in_digits",
]
