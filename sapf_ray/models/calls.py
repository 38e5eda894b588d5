"""How each kind of denoiser is called with noisy latents, times and conditions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapf_ray.models.conditions import Conditions

TOKENS_MULTIPLE = 16


class DenoiserCall(Protocol):
    """A row's ``call``."""

    def __call__(
        self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        """The network's output for n images, (n, C or 2C, h, w).

        Args:
            denoiser: The network, or anything that is called as it is.
            noisy: (n, C, h, w) in its precision.
            timesteps: (n,), from 0 to the length of the diffusion.
            conditions: n of them.
        """


def text_arguments(states: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a U-Net for text states (n, L, d).

    On CPU text tokens are filled up with masked zeros to a multiple of 16: attention over CLIP's 77
    takes up to twice the time of attention over 80. A masked token has weight 0 and gradient 0, so
    values and per-sample gradients stay what they are.
    """
    missing = -states.shape[1] % TOKENS_MULTIPLE
    if states.device.type != "cpu" or missing == 0:
        return {"encoder_hidden_states": states}
    keep = torch.ones(states.shape[0], states.shape[1] + missing, dtype=torch.bool)
    keep[:, states.shape[1] :] = False
    return {
        "encoder_hidden_states": F.pad(states, (0, 0, 0, missing)),
        "encoder_attention_mask": keep,
    }


def call_with_text(
    denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions
) -> Tensor:
    """Stable Diffusion's U-Net."""
    assert conditions.states is not None
    arguments = text_arguments(conditions.states)
    return denoiser(noisy, timesteps, **arguments, return_dict=False)[0]


def call_with_labels(
    denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions
) -> Tensor:
    """DiT."""
    labels = conditions.labels
    return denoiser(noisy, timesteps, class_labels=labels, return_dict=False)[0]


def call_sdxl(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """Stable Diffusion XL's U-Net."""
    assert conditions.states is not None
    added = {"text_embeds": conditions.pooled, "time_ids": conditions.ids}
    arguments = text_arguments(conditions.states)
    return denoiser(noisy, timesteps, **arguments, added_cond_kwargs=added, return_dict=False)[0]


def call_sd3(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """Stable Diffusion 3's transformer."""
    return denoiser(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=conditions.states,
        pooled_projections=conditions.pooled,
        return_dict=False,
    )[0]


def call_flux(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """FLUX.1's transformer: latents packed 2 x 2 into tokens, times from 0 to 1, positions given.

    Channels of a token are in the order (channel, row, column), as of ``FluxPipeline``.
    """
    assert conditions.states is not None
    height, width = (side // 2 for side in noisy.shape[-2:])
    device = noisy.device
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    predicted = denoiser(
        hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).mT,
        timestep=timesteps.to(noisy.dtype) / 1000,
        guidance=conditions.guidance,
        pooled_projections=conditions.pooled,
        encoder_hidden_states=conditions.states,
        txt_ids=torch.zeros(conditions.states.shape[1], 3, device=device, dtype=noisy.dtype),
        img_ids=places.to(device, noisy.dtype),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(predicted.mT.unflatten(2, (height, width)), 2)


def call_masked(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """PixArt's and Sana's transformers."""
    config = denoiser.config
    options = {}
    if "use_additional_conditions" in config:  # PixArt's; Sigma has none, its pipeline says so
        options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return denoiser(
        noisy,
        encoder_hidden_states=conditions.states,
        encoder_attention_mask=conditions.mask,
        timestep=timesteps * config.get("timestep_scale", 1),
        return_dict=False,
        **options,
    )[0]
