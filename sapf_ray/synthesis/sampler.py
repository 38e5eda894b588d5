"""Sampling: DPM-Solver++ (Lu et al. 2022) with classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from sapf_ray.models.conditioning import denoiser_of, predict
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.loading import resolution_of


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
    scheduler = solver(pipe)
    scheduler.set_timesteps(steps, device=denoiser.device)
    side = int(denoiser.config.sample_size)
    if resolution is not None:
        side = side * resolution // resolution_of(pipe)
    shape = (denoiser.config.in_channels, side, side)
    latents = initial_noise(seeds, shape).to(denoiser.device) * scheduler.init_noise_sigma
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
    if guided:
        free = null.to(conditions.device).expand(len(conditions))
        conditions = Conditions.cat([free, conditions])
    conditions = conditions.to(denoiser.device, denoiser.dtype)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(
            torch.cat([latents, latents]) if guided else latents, t
        )
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
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def solver(pipe: Any) -> Any:
    """A fresh DPM-Solver++ on the noise schedule the model was trained with."""
    # from_config warns about each entry of the training scheduler that the solver has no use for
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    return DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )


def initial_noise(seeds: Sequence[int] | np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 (n, C, h, w); row i depends on seed i alone."""
    generator = torch.Generator("cpu")
    noise = torch.empty(len(seeds), *shape)
    for row, seed in enumerate(seeds):
        noise[row] = torch.randn(shape, generator=generator.manual_seed(int(seed)))
    return noise
