"""How much arithmetic a model's forward pass has, counted without computing it."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from sapf_ray.models.public_model import PublicModel

GLYPHS_GFLOP = 0.0647
"""Of ``glyphs-tiny``, whose costs are shipped."""


def forward_gflop(model: PublicModel) -> float:
    """10^9 floating point operations of the denoiser for one image at the run's resolution."""
    with FlopCounterMode(display=False) as counter:
        model.blank_prediction()
    return counter.get_total_flops() / 1e9


def size_factor(model: PublicModel) -> float:
    """Arithmetic of a forward pass against that of ``glyphs-tiny``."""
    return forward_gflop(model) / GLYPHS_GFLOP
