"""Candidate pools of the paper's models from their published configs, on the meta device: no
weights, no network.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from jobs.random_models import DIT_XL_2
from jobs.random_models import UNET_1_5 as SD_1_5
from jobs.random_models import UNET_2_1_BASE as SD_2_1_BASE
from sapf_ray.errors import ConfigError
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.pool import candidate_pool
from sapf_ray.saliency.scores import n_selected


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
