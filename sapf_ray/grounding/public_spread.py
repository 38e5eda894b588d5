"""How public images of several groups lie in the space of a head: all of it free."""

from __future__ import annotations

import numpy as np

from sapf_ray.grounding.candidates import show_candidates
from sapf_ray.models.class_head import Spread
from sapf_ray.models.feature_table import feature_row
from sapf_ray.models.glyph_features import BUNDLED_FEATURES
from sapf_ray.models.public_features import Features
from sapf_ray.runs.context import RunContext

GLYPHS = BUNDLED_FEATURES / "spread.npz"
"""Spread of rendered characters, written by ``python -m jobs.public_features``."""


def public_spread(run: RunContext, features: Features) -> Spread:
    """Of public images that differ as classes may: rendered characters where the features are those
    of glyphs, else the vote's candidates, shown by the public model.

    Args:
        run: The run; none of its records is read.
        features: The features in which its records are compared.
    """
    settings = run.config.grounding
    if feature_row(settings.features, run.config.model.path) == "glyphs":
        return Spread.load(GLYPHS)
    _, shown = show_candidates(run, features)
    group = np.repeat(np.arange(len(shown)), shown.shape[1])
    return Spread.of(shown.reshape(len(group), -1), group)
