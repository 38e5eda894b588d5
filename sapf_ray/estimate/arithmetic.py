"""How much arithmetic a model's forward pass has, counted without computing it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sapf_ray.models.conditioning import blank_conditions, predict
from sapf_ray.models.public_model import PublicModel

GLYPHS_GFLOP = 0.0647
"""Of ``glyphs-tiny``, whose costs are shipped."""


def forward_gflop(model: PublicModel) -> float:
    """10^9 floating point operations of the denoiser for one image at the model's resolution."""
    config = model.denoiser_config
    side = config["sample_size"]
    noisy = torch.empty(1, config["in_channels"], side, side, device="meta")
    conditions = blank_conditions(model.family.conditioning, config, n=1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(
            model.denoiser,
            noisy,
            torch.empty(1, device="meta"),
            conditions,
        )
    return counter.get_total_flops() / 1e9


def size_factor(model: PublicModel) -> float:
    """Arithmetic of a forward pass against that of ``glyphs-tiny``."""
    return forward_gflop(model) / GLYPHS_GFLOP
