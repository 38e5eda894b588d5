"""Writes what the shipped feature network sees of public images, so that no run has to make it.

``spread.npz``: how rendered characters lie in its space, for private heads. ``candidates-*.npy``:
features of the images that show the vocabulary of each bundled model, for votes.

    python -m jobs.public_features        # two minutes on two cores
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, RunConfig
from sapf_ray.files import write_array
from sapf_ray.glyphs import CHARACTERS, GlyphCorpus
from sapf_ray.grounding.candidates import SHIPPED, Group, candidate_features
from sapf_ray.grounding.public_spread import GLYPHS
from sapf_ray.models.class_head import Spread
from sapf_ray.models.feature_table import make_features
from sapf_ray.models.public_features import GlyphSpace
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vocabulary import BUNDLED, known_prompts

EACH = 40  # rendered images of a character
SEED = 0


def glyph_spread(each: int = EACH) -> Spread:
    """Of ``each`` images of every character, in the style that pretraining saw."""
    groups = np.tile(np.arange(len(CHARACTERS)), each)
    images, _ = GlyphCorpus(seed=SEED).render(
        len(groups), torch.Generator().manual_seed(SEED), classes=torch.from_numpy(groups)
    )
    return Spread.of(GlyphSpace()(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()), groups)


def ship_candidates(name: str, folder: Path) -> None:
    """Of a bundled model's whole vocabulary, with the default settings, in half precision."""
    config = RunConfig(model=ModelConfig(path=name))
    with tempfile.TemporaryDirectory() as made:
        candidate_features(
            Group(prompts=known_prompts(name), folder=Path(made)),
            model=PublicModel.open(config.model),
            features=make_features(config.grounding.features, config.model),
            config=config,
        )
        (found,) = Path(made).iterdir()
        write_array(folder / found.name, np.load(found).astype(np.float16))


if __name__ == "__main__":
    glyph_spread().save(GLYPHS)
    for old in SHIPPED.glob("candidates-*.npy"):
        old.unlink()
    with cluster.session(RunConfig().cluster):
        for model in BUNDLED:
            ship_candidates(model, SHIPPED)
