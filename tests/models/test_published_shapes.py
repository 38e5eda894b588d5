"""Candidate pools of the paper's models from their published configs, on the meta device: no
weights, no network.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from sapf_ray.errors import ConfigError
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.pool import candidate_pool
from sapf_ray.saliency.scores import n_selected

SD_1_5 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_2_1_BASE = SD_1_5 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "upcast_attention": False,
}
DIT_XL_2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def on_meta(kind: type, config: dict) -> nn.Module:
    with torch.device("meta"):
        return kind.from_config(config)


def millions(denoiser: nn.Module) -> float:
    return sum(p.numel() for p in denoiser.parameters()) / 1e6


@pytest.fixture(scope="module")
def sd_1_5() -> nn.Module:
    return on_meta(UNet2DConditionModel, SD_1_5)


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    return on_meta(DiTTransformer2DModel, DIT_XL_2)


def test_stable_diffusion_1_5_has_96_matrices_of_68_73_million_parameters(sd_1_5):
    pool = candidate_pool(sd_1_5)
    assert len(pool) == 96 and n_selected(96, 0.3) == 29
    assert sum(entry.weight.numel() for entry in pool.values()) / 1e6 == pytest.approx(
        68.73, abs=0.01
    )
    assert millions(sd_1_5) == pytest.approx(859.5, abs=0.1) == PUBLIC_MODELS["sd-v1-5"].parameters
    assert all(entry.weight.is_meta for entry in pool.values())


def test_the_authors_pool_with_output_projections_has_128(sd_1_5):
    """Table 7 of the paper shows 26 q/k/v matrices at 30 %: fewer than 29, so its pool had output
    projections too.
    """
    assert len(candidate_pool(sd_1_5, "qkvo")) == 128 and n_selected(128, 0.3) == 39
    assert (
        len(candidate_pool(sd_1_5, "cross_q")) == 16
        and len(candidate_pool(sd_1_5, "qkv_no_middle")) == 90
    )


def test_stable_diffusion_2_1_base_has_the_same_pool(sd_1_5):
    unet = on_meta(UNet2DConditionModel, SD_2_1_BASE)
    pool = candidate_pool(unet)
    assert list(pool) == list(candidate_pool(sd_1_5))
    wide = [
        n
        for n, entry in pool.items()
        if n.endswith(("attn2.to_k", "attn2.to_v")) and entry.weight.shape[1] == 1024
    ]
    assert len(wide) == 32
    assert millions(unet) == pytest.approx(PUBLIC_MODELS["sd-2-1-base"].parameters, abs=0.1)


def test_dit_xl_2_has_84_matrices_in_28_layers(dit):
    pool = candidate_pool(dit)
    assert len(pool) == 84 and n_selected(84, 0.3) == 26 and len(candidate_pool(dit, "qkvo")) == 112
    assert {tuple(entry.weight.shape) for entry in pool.values()} == {(1152, 1152)}
    assert {name.split(".")[1] for name in pool} == {str(i) for i in range(28)}
    assert millions(dit) == pytest.approx(PUBLIC_MODELS["dit-xl-2-256"].parameters, abs=0.1)


def test_cross_attention_pools_name_the_model_that_has_none(dit):
    with pytest.raises(ConfigError, match="cross-attention"):
        candidate_pool(dit, "cross_q")
