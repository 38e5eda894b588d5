"""Sampling: DPM-Solver++ (Lu et al. 2022) with classifier-free guidance (Ho & Salimans 2022); for
models of flow matching the solver of their own pipeline.

A guidance-distilled model (FLUX.1-dev) is told the guidance scale instead, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapf_ray.models.conditioning import denoiser_of, predict
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.encoders import size_ids
from sapf_ray.models.families import latent_side
from sapf_ray.models.loading import resolution_of
from sapf_ray.models.solvers import set_steps, solver
from sapf_ray.models.vae import LatentScale


@torch.no_grad()
def sample_images(
    pipe: Any,
    conditions: Conditions,
    *,
    null: Conditions,
    seeds: Sequence[int] | np.ndarray,
    steps: int,
    guidance_scale: float,
    resolution: int | None = None,
) -> np.ndarray:
    """One image per row of ``conditions``. Pure: the pipeline's own scheduler and generators are
    not touched.

    Each image starts from noise drawn on the CPU from its own seed: neither its neighbours in the
    batch nor the device change what it starts from.

    Args:
        pipe: The public pipeline (its denoiser, VAE and scheduler).
        conditions: n of the images.
        null: One null condition; not used at guidance 1.
        seeds: n seeds in [0, 2**63).
        steps: Solver steps.
        guidance_scale: 1 is none.
        resolution: Side R of the images in pixels, the pipeline's own unless given; see
            :meth:`sapf_ray.models.public_model.PublicModel.check_resolution`.

    Returns:
        uint8 (n, R, R, 3).
    """
    denoiser = denoiser_of(pipe)
    side = latent_side(denoiser.config)
    if resolution is not None:
        side = side * resolution // resolution_of(pipe)
    if conditions.ids is not None:
        ids = size_ids(1, resolution or resolution_of(pipe))
        conditions, null = (
            told.with_parts(ids=ids.expand(len(told), -1)) for told in (conditions, null)
        )
    scheduler = solver(pipe)
    set_steps(pipe, scheduler, steps=steps, side=side)
    latents = initial_noise(seeds, (pipe.vae.config.latent_channels, side, side))
    latents = latents.to(denoiser.device) * getattr(scheduler, "init_noise_sigma", 1)
    return decode_images(
        pipe,
        denoise(
            pipe,
            scheduler,
            latents=latents,
            conditions=conditions,
            null=null,
            guidance_scale=guidance_scale,
        ),
    )


@torch.no_grad()
def denoise(
    pipe: Any,
    scheduler: Any,
    *,
    latents: Tensor,
    conditions: Conditions,
    null: Conditions,
    guidance_scale: float,
) -> Tensor:
    """Runs ``scheduler`` over all its timesteps.

    Args:
        pipe: The public pipeline.
        scheduler: A solver with its timesteps set.
        latents: (n, C, h, w) at the first timestep.
        conditions: n of the images.
        null: One null condition; not used at guidance 1.
        guidance_scale: 1 is none.

    Returns:
        The scaled clean latents (n, C, h, w).
    """
    denoiser = denoiser_of(pipe)
    guided = guidance_scale != 1.0
    if conditions.guidance is not None:
        told = torch.full_like(conditions.guidance, guidance_scale)
        conditions = conditions.with_parts(guidance=told)
        guided = False
    if guided:
        free = null.to(conditions.device).expand(len(conditions))
        conditions = Conditions.cat([free, conditions])
    conditions = conditions.to(denoiser.device, denoiser.dtype)
    for t in scheduler.timesteps:
        model_input = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(model_input, t)
        predicted = predict(denoiser, model_input.to(denoiser.dtype), t, conditions)
        if guided:
            without, conditional = predicted.chunk(2)
            predicted = without + guidance_scale * (conditional - without)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents


@torch.no_grad()
def decode_images(pipe: Any, latents: Tensor) -> np.ndarray:
    """uint8 (n, R, R, 3) of scaled latents (n, C, h, w)."""
    vae = pipe.vae
    decoded = vae.decode(LatentScale.of(vae).unscale(latents).to(vae.dtype)).sample.float()
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def initial_noise(seeds: Sequence[int] | np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 (n, C, h, w); row i depends on seed i alone."""
    generator = torch.Generator("cpu")
    noise = torch.empty(len(seeds), *shape)
    for row, seed in enumerate(seeds):
        noise[row] = torch.randn(shape, generator=generator.manual_seed(int(seed)))
    return noise
