"""Candidates of bundled models: shipped, so that no run makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sapf_ray.config import ModelConfig, RunConfig
from sapf_ray.grounding import candidates as module
from sapf_ray.grounding.candidates import Group, Showing, candidate_features
from sapf_ray.models.feature_table import make_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vocabulary import BUNDLED, known_prompts


def shipped(name: str, folder: Path) -> np.ndarray:
    config = RunConfig(model=ModelConfig(path=name))
    return candidate_features(
        Group(prompts=known_prompts(name), folder=folder),
        model=PublicModel.open(config.model),
        features=make_features("glyphs", config.model),
        config=config,
    )


@pytest.mark.parametrize("name", BUNDLED)
def test_a_run_with_the_defaults_makes_none(tmp_path, monkeypatch, name):
    """Fails where a model, the feature network, a vocabulary or a default changes: then
    ``python -m jobs.public_features`` is due.
    """
    monkeypatch.setattr(module, "_make", lambda *arguments: pytest.fail("made anew"))
    found = shipped(name, tmp_path)
    assert found.shape == (62, 32, 96) and found.dtype == np.float32
    assert list(tmp_path.iterdir()) == []


def test_they_are_what_the_model_shows(tmp_path):
    config = RunConfig()
    showing = Showing(
        prompts=known_prompts("glyphs-tiny"),
        model=config.model,
        features=make_features("glyphs", config.model),
        images=config.grounding.candidate_images,
        steps=config.grounding.candidate_steps,
        guidance=1.0,
        sampling=config.synthesis,
    )
    some = np.array([0, 100])  # the first image of the first prompt, the fifth of the fourth
    made = module._show._function(showing, some).value
    kept = shipped("glyphs-tiny", tmp_path).reshape(-1, 96)[some]
    assert np.abs(made - kept).max() < 0.01 * np.abs(kept).max()
