from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sapf_ray.config import EvolutionConfig, ModelConfig
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.evolution.api import latent_means
from sapf_ray.evolution.embedding import VaeEmbedding, make_embedding
from sapf_ray.evolution.embedding_table import EMBEDDINGS
from sapf_ray.models.loading import load_pipeline
from sapf_ray.registry import names

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "dimension"), [("vae", 64), ("glyph", 96)])
def test_a_row_depends_on_its_image_alone(tiny_pipeline, name, dimension):
    embed = make_embedding(
        EvolutionConfig(embedding=name), ModelConfig(path=str(tiny_pipeline)), batch_size=3
    )
    rows = embed(IMAGES)
    assert rows.shape == (7, dimension) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert np.allclose(rows[2:3], embed(IMAGES[2:3]), atol=1e-5)
    assert len(np.unique(rows.round(5), axis=0)) == 7


def test_vae_is_the_latent_mean(tiny_pipeline):
    pipe = load_pipeline(str(tiny_pipeline))
    rows = VaeEmbedding(model=ModelConfig(path=str(tiny_pipeline)))(IMAGES)
    assert np.allclose(rows, latent_means(pipe, IMAGES).flatten(1).numpy(), atol=1e-5)


def test_large_latents_are_averaged_down(tiny_pipeline):
    large = np.repeat(np.repeat(IMAGES, 8, 1), 8, 2)  # 32 x 32 latents
    assert VaeEmbedding(model=ModelConfig(path=str(tiny_pipeline)))(large).shape == (7, 4 * 16 * 16)


def test_every_row_is_found_and_the_config_takes_the_names_of_the_table():
    assert tuple(EMBEDDINGS) == names("evolution.embedding") == ("vae", "glyph", "inception")
    assert all(callable(EMBEDDINGS[name]) for name in EMBEDDINGS)
    with pytest.raises(ConfigError, match="must be one of vae, glyph, inception"):
        EvolutionConfig(embedding="clip")


def test_inception_weights_are_checked_before_anything_is_read(tmp_path):
    config = EvolutionConfig(embedding="inception", inception_weights=str(tmp_path / "no.pth"))
    with pytest.raises(DataError, match=r"^evolution\.inception_weights = .*no such file"):
        make_embedding(config, ModelConfig(), batch_size=2)


@pytest.mark.long
def test_inception_features(tmp_path, monkeypatch):
    # random weights: only the way they are used is tested
    with monkeypatch.context() as patched:
        patched.setenv("TORCH_HOME", str(tmp_path / "torch"))
        patched.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *a, **k: {},
        )
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    config = EvolutionConfig(
        embedding="inception", inception_weights=str(tmp_path / "inception.pth")
    )
    rows = make_embedding(config, ModelConfig(), batch_size=2)(IMAGES[:3])
    assert rows.shape == (3, 2048) and np.isfinite(rows).all()
