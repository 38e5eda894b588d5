"""The factor on losses of half-precision models: it saves small gradients, and changes no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sapf_ray.config import FinetuneConfig
from sapf_ray.finetune.adapter import add_adapter, sample_gradients
from sapf_ray.grad_sample.backprop_scale import backprop_scale
from sapf_ray.grad_sample.capture import PoolCapture
from sapf_ray.models.pool import candidate_pool
from tests.tiny import tiny_unet

SHAPE = (4, 64, 64)  # latents of 512 pixels, over whose elements a loss is the mean
ROWS = 3


def losses(unet: nn.Module, dtype: torch.dtype) -> Tensor:
    """(3,) losses as small as those of large images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, 4, 4, generator=generator).to(dtype)
    states = torch.randn(ROWS, 16, 16, generator=generator).to(dtype)
    predicted = unet(x, torch.tensor(7), states).sample.float()
    return predicted.square().flatten(1).sum(1) / torch.Size(SHAPE).numel()


def lora_rows(dtype: torch.dtype, scale: float) -> Tensor:
    unet = tiny_unet().requires_grad_(False).eval().to(dtype)
    config = FinetuneConfig()
    factors = add_adapter(unet, list(candidate_pool(unet)), config=config, seed=0)
    with torch.no_grad():
        for p in factors.values():
            p.add_(0.1)
    engine = sample_gradients(unet, factors, config=config, scale=scale)
    return engine.grad_sample(losses(unet, dtype))  # type: ignore[union-attr]


def pool_gradients(dtype: torch.dtype, scale: float) -> Tensor:
    """Also checks that norms are those of the gradients."""
    unet = tiny_unet().requires_grad_(False).eval().to(dtype)
    with PoolCapture(candidate_pool(unet), keep=True, scale=scale) as capture:
        (losses(unet, dtype).sum() * scale).backward()
    rows = [rows.flatten(1) for _, _, rows in capture.gradients()]
    norms = torch.stack([part.norm(dim=1) for part in rows], dim=1)
    torch.testing.assert_close(capture.norms(), norms, rtol=1e-4, atol=0)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("taken", [lora_rows, pool_gradients])
def test_small_gradients_survive_half_precision(taken):
    scale = backprop_scale(torch.float16, SHAPE)
    assert scale == 2.0**14
    exact = taken(torch.float32, 1.0)
    assert torch.equal(taken(torch.float32, scale), exact)  # a power of two: no bit changes
    lost = (taken(torch.float16, 1.0) - exact).norm() / exact.norm()
    kept = (taken(torch.float16, scale) - exact).norm() / exact.norm()
    assert kept < 0.02 and lost > 5 * kept


def test_other_precisions_have_none():
    assert backprop_scale(torch.float32, SHAPE) == backprop_scale(torch.bfloat16, SHAPE) == 1.0
