"""How much arithmetic a model's forward pass has, counted without computing it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sapf_ray.models.conditioning import condition_arguments, predict
from sapf_ray.models.public_model import PublicModel

GLYPHS_GFLOP = 0.0647
"""Of ``glyphs-tiny``, whose costs are shipped."""

_TOKENS = 77


def forward_gflop(model: PublicModel) -> float:
    """10^9 floating point operations of the denoiser for one image at the model's resolution."""
    config = model.denoiser_config
    side = config["sample_size"]
    noisy = torch.empty(1, config["in_channels"], side, side, device="meta")
    width = config.get("cross_attention_dim")
    if width is None:
        conditions = torch.empty(1, dtype=torch.int64, device="meta")
    else:
        conditions = torch.empty(1, _TOKENS, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(
            model.denoiser,
            noisy,
            torch.empty(1, device="meta"),
            condition_arguments(conditions),
        )
    return counter.get_total_flops() / 1e9


def size_factor(model: PublicModel) -> float:
    """Arithmetic of a forward pass against that of ``glyphs-tiny``."""
    return forward_gflop(model) / GLYPHS_GFLOP
