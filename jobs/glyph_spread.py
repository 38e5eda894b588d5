"""Writes how rendered characters lie in the shipped feature network's space: public, for heads.

python -m jobs.glyph_spread        # a minute on one core
"""

from __future__ import annotations

import numpy as np
import torch

from sapf_ray.glyphs import CHARACTERS, GlyphCorpus
from sapf_ray.grounding.public_spread import GLYPHS
from sapf_ray.models.class_head import Spread
from sapf_ray.models.public_features import GlyphSpace

EACH = 40  # images of a character
SEED = 0


def glyph_spread(each: int = EACH) -> Spread:
    """Of ``each`` images of every character, in the style that pretraining saw."""
    groups = np.tile(np.arange(len(CHARACTERS)), each)
    images, _ = GlyphCorpus(seed=SEED).render(
        len(groups), torch.Generator().manual_seed(SEED), classes=torch.from_numpy(groups)
    )
    return Spread.of(GlyphSpace()(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()), groups)


if __name__ == "__main__":
    glyph_spread().save(GLYPHS)
