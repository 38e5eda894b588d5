"""The catalog agrees with what ships, and its names lead to models."""

from __future__ import annotations

import json

import pytest

from sapf_ray.cli import main
from sapf_ray.config import ModelConfig
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import DataError
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.location import bundled_models, resolve_model
from sapf_ray.models.public_model import PublicModel

PROMPTS = DATA_SETS["digits"].prompts


def test_every_bundled_model_has_a_row_that_tells_the_truth():
    assert sorted(name for name, row in PUBLIC_MODELS.items() if not row.hub_id) == bundled_models()
    for name in bundled_models():
        row = PUBLIC_MODELS[name]
        model = PublicModel.open(ModelConfig(path=name))
        model.check_classes(PROMPTS)
        denoiser = model.denoiser
        assert model.resolution == row.resolution
        assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(
            row.parameters, abs=0.006
        )
        assert denoiser.config.sample_size * 4 == row.resolution
        assert (row.conditioning == "labels") == hasattr(denoiser.config, "num_embeds_ada_norm")


def test_short_names_are_hub_ids():
    assert resolve_model("realistic-v6") == "SG161222/Realistic_Vision_V6.0_B1_noVAE"
    assert all(
        resolve_model(name) == row.hub_id for name, row in PUBLIC_MODELS.items() if row.hub_id
    )
    with pytest.raises(DataError, match=r"glyphs-tiny.*sd-v1-5"):
        resolve_model("sd-v9")


def test_listing_prints_every_row(capsys):
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (
        [row["name"] for row in rows] == list(PUBLIC_MODELS)
        and rows[0]["bundled"]
        and not rows[-1]["bundled"]
    )
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PUBLIC_MODELS)
