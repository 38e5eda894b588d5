"""Random weights in published shapes: what is written loads, and has the published size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jobs.random_models import MAX_TOKENS, ROWS, VOCABULARY, Part, clip_tokenizer, write
from sapf_ray.config import ModelConfig
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.conditioning import CONDITIONINGS, blank_conditions, predict
from sapf_ray.models.families import FAMILIES
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.text_encoder import text_states

# millions of parameters of the published files
MILLIONS = {"CLIP_L": 123.06, "OPEN_CLIP_H": 340.39, "AutoencoderKL": 83.65}


SIDES = {"sd-2-1-v": 768, "dit-xl-2-256": 256}


def millions(part: Part) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in part.build().parameters()) / 1e6


FURTHER = {
    "sdxl-base": {"unet": 2567.46, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66},
    "sd-3-5-medium": {"transformer": 2243.17},
    "flux-1-dev": {"transformer": 11901.41, "vae": 83.82},
    "pixart-sigma-1024": {"transformer": 610.86},
    "sana-1600m-1024": {"transformer": 1604.46},
}
"""Millions of parameters of published files of further families."""


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER)
def test_parts_of_further_families_have_the_published_size(name):
    for folder, size in FURTHER[name].items():
        assert millions(ROWS[name].parts[folder]) == pytest.approx(size, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER)
def test_full_width_denoisers_take_what_they_are_told(name):
    """On the meta device: shapes alone."""
    row = ROWS[name]
    kind = FAMILIES[row.pipeline].conditioning
    part = row.parts.get("unet") or row.parts["transformer"]
    with torch.device("meta"):
        denoiser = part.build()
    channels = CONDITIONINGS[kind].latent_channels(denoiser.config)
    noisy = torch.empty(1, channels, 32, 32, device="meta")
    told = blank_conditions(kind, denoiser.config, device="meta")
    with torch.no_grad():
        said = predict(denoiser, noisy, torch.empty(1, device="meta"), told)
    assert said.shape == noisy.shape
    assert len(candidate_pool(denoiser)) == POOLS[name]


POOLS = {
    "sdxl-base": 70 * 2 * 3,
    "sd-3-5-medium": 24 * 6 + 13 * 3,
    "flux-1-dev": 19 * 6 + 38 * 3,
    "pixart-sigma-1024": 28 * 2 * 3,
    "sana-1600m-1024": 20 * 2 * 3,
}
"""Matrices of the pool qkv."""


@pytest.mark.parametrize("name", sorted(ROWS.keys() - FURTHER.keys()))
def test_parts_have_the_published_size(name):
    parts = ROWS[name].parts
    denoiser = parts.get("unet") or parts["transformer"]
    published = PUBLIC_MODELS[{"sd-2-1-v": "sd-2-1-base"}.get(name, name)]
    assert millions(denoiser) == pytest.approx(published.parameters, abs=0.1)
    assert millions(parts["vae"]) == pytest.approx(MILLIONS["AutoencoderKL"], abs=0.01)
    if "text_encoder" in parts:
        text = "CLIP_L" if name == "sd-v1-5" else "OPEN_CLIP_H"
        assert millions(parts["text_encoder"]) == pytest.approx(MILLIONS[text], abs=0.01)
        width = parts["text_encoder"].config["hidden_size"]
        assert denoiser.config["cross_attention_dim"] == width


def test_the_tokenizer_has_clips_size_and_reads_any_text():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == VOCABULARY and tokenizer.model_max_length == MAX_TOKENS
    assert len(tokenizer("an image of an airplane")["input_ids"]) == 5 + 2
    strange = tokenizer("Zürich, 東京 ≠ xyzzy")["input_ids"]
    assert tokenizer.unk_token_id not in strange[1:-1]
    ends = [strange[0], strange[-1]]
    assert ends == [VOCABULARY - 2, VOCABULARY - 1]


def narrow(name: str) -> dict[str, Part]:
    """A row's parts, a few channels wide."""
    parts = dict(ROWS[name].parts)
    small = {
        "unet": {
            "block_out_channels": [64] * 4,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        "vae": {"block_out_channels": [32] * 4},
        "text_encoder": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
        "transformer": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    }
    for folder, changed in small.items():
        if folder in parts:
            parts[folder] = replace(parts[folder], config={**parts[folder].config, **changed})
    return parts


@pytest.mark.parametrize("name", ["sd-2-1-v", "dit-xl-2-256"])
def test_what_is_written_is_a_pipeline(name, tmp_path):
    write(replace(ROWS[name], parts=narrow(name)), tmp_path / name, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    config = ModelConfig(path=str(tmp_path / name), dtype="bfloat16", resolution=64)
    model = PublicModel.open(config)
    assert (model.native_resolution, model.resolution) == (SIDES[name], 64)
    pipe = load_pipeline(config)
    assert pipe.vae.dtype == torch.bfloat16
    if name == "sd-2-1-v":
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        assert text_states(config, ["a dog"])[0].shape == (1, MAX_TOKENS, 32)
    else:
        assert len(model.labels) == 1000
