"""What differs between the autoencoders of public models: their scale, and whether they are
variational.

>>> scale = LatentScale(factor=0.5, shift=1.0)
>>> scale.scale(torch.tensor([3.0])), scale.unscale(torch.tensor([1.0]))
(tensor([1.]), tensor([3.]))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_SPREAD = -30.0
"""Log-variance of a latent that is not random: as low as diffusers lets one be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentScale:
    """How raw latents (n, C, h, w) become those that a denoiser sees, and back.

    Attributes:
        factor: What they are multiplied with.
        shift: What is taken off before: one number (SD3, FLUX), or one a channel, (C, 1, 1).
        spread: (C, 1, 1) what each channel is divided by, where the config says so (some SDXL).
    """

    factor: float
    shift: float | Tensor | None = None
    spread: Tensor | None = None

    @classmethod
    def of(cls, vae: Any) -> LatentScale:
        """From the autoencoder's config, as the stock pipelines read it."""
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return cls(factor=config.scaling_factor, shift=config.get("shift_factor"))
        shift, spread = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        return cls(factor=config.scaling_factor, shift=shift, spread=spread)

    def scale(self, raw: Tensor) -> Tensor:
        """Raw latents to the denoiser's."""
        if self.shift is not None:
            raw = raw - _like(self.shift, raw)
        scaled = raw * self.factor
        return scaled if self.spread is None else scaled / _like(self.spread, raw)

    def unscale(self, latents: Tensor) -> Tensor:
        """The denoiser's latents to raw ones."""
        if self.spread is not None:
            latents = latents * _like(self.spread, latents)
        raw = latents / self.factor
        return raw if self.shift is None else raw + _like(self.shift, raw)


def _like(value: float | Tensor, latents: Tensor) -> float | Tensor:
    return value.to(latents) if isinstance(value, Tensor) else value


def posterior_parameters(vae: Any, pixels: Tensor) -> Tensor:
    """(n, 2C, h, w) mean and log-variance of raw latents of pixels (n, 3, R, R) from -1 to 1.

    Sana's autoencoder has no posterior: its latents come without spread.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    latent = encoded.latent
    return torch.cat([latent, torch.full_like(latent, NO_SPREAD)], dim=1)
