"""Public features: a row depends on its image alone, and every network is told apart by its key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from sapf_ray.config import ModelConfig
from sapf_ray.errors import DataError
from sapf_ray.models.feature_table import FEATURES, feature_row, make_features
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_features import posterior_moments

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32}


def saved_clip(directory):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        **SMALL, intermediate_size=16, image_size=224, projection_dim=8
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(directory)


def saved_dino(directory):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL, mlp_ratio=1, image_size=224)
    transformers.Dinov2Model(config).save_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "dimension"), [("glyphs", 96), ("latents", 64), ("clip", 8), ("dino", 16)]
)
def test_a_row_depends_on_its_image_alone(tiny_pipeline, tmp_path, name, dimension):
    networks = {"clip": saved_clip, "dino": saved_dino}
    if name in networks:
        networks[name](tmp_path)
        name = str(tmp_path)
    features = make_features(name, ModelConfig(path=str(tiny_pipeline)))
    rows = features(IMAGES)
    assert rows.shape == (5, dimension) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert np.allclose(rows[2:3], features(IMAGES[2:3]), atol=1e-4)
    assert len(np.unique(rows.round(6), axis=0)) == 5


def test_latents_come_from_moments_where_the_caller_has_them(tiny_pipeline):
    features = make_features("latents", ModelConfig(path=str(tiny_pipeline)))
    moments = posterior_moments(load_pipeline(str(tiny_pipeline)).vae, IMAGES)
    assert np.allclose(features(IMAGES), features(IMAGES[:0], moments), atol=1e-5)
    large = np.repeat(np.repeat(moments, 8, 2), 8, 3)  # 32 x 32 positions
    assert features(IMAGES[:0], large).shape == (5, 4 * 8 * 8)


def test_auto_takes_what_fits_the_public_model():
    assert feature_row("auto", "glyphs-tiny") == feature_row("auto", "letters-tiny") == "glyphs"
    assert feature_row("auto", "/models/sd") == "latents"
    assert [feature_row(name, "x") for name in FEATURES] == list(FEATURES)


def test_keys_tell_networks_apart(tiny_pipeline, tmp_path):
    model = ModelConfig(path=str(tiny_pipeline))
    saved_clip(tmp_path / "clip")
    saved_dino(tmp_path / "dino")
    names = ("glyphs", "latents", str(tmp_path / "clip"), str(tmp_path / "dino"))
    keys = [make_features(name, model).key for name in names]
    assert len(set(keys)) == len(names)
    weights = tmp_path / "clip" / "config.json"
    weights.write_text(weights.read_text() + " ")
    assert make_features(str(tmp_path / "clip"), model).key != keys[2]


def test_what_is_no_such_network_is_one_line(tmp_path):
    (tmp_path / "bert").mkdir()
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for name, text in (
        (str(tmp_path / "nowhere"), "must be auto, glyphs, latents"),
        (str(tmp_path / "bert"), "of type bert; must be CLIP or DINOv2"),
        (str(tmp_path / "weights.pth"), "not a PyTorch weights file"),
    ):
        with pytest.raises(DataError, match=text) as caught:
            make_features(name, ModelConfig())
        message = str(caught.value)
        assert "\n" not in message and message.startswith(f"grounding.features = {name!r}")
