"""The diffusion loss, one value per record (paper eq. 5), shared by selection and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sapf_ray.models.conditioning import predict
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.processes import DENSITIES, Process
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The randomness of one pass over ``n`` records, ``k`` draws each; shapes (n, k, ...)."""

    posterior: Tensor  # (n, C, h, w) standard normal: which latent of the VAE posterior
    noise: Tensor  # (n, k, C, h, w) standard normal
    timesteps: Tensor  # (n, k) int64


def draw(
    key: NoiseKey,
    purpose: str,
    step: int,
    records: np.ndarray,
    *,
    k: int,
    latent_shape: tuple[int, ...],
    process: Process,
    part: tuple[float, float] = (0.0, 1.0),
) -> Draws:
    """Draws that depend on (key, purpose, step, record) only, never on how records are spread over
    workers.

    So a step re-executed by another number of workers is the same step.

    Args:
        records: (n,) int64.
        k: Draws per record.
        latent_shape: (C, h, w).
        process: Says how many times there are, and how likely each is.
        part: Where times are drawn, as shares of the diffusion; 0 is the clean end.
    """
    times_of = DENSITIES[process.density]
    generator = torch.Generator()
    flat = int(np.prod(latent_shape))
    normal = torch.empty(len(records), k + 1, *latent_shape)
    t = torch.empty(len(records), k, dtype=torch.int64)
    for row, seed in enumerate(key.seeds(purpose, step, records)):
        generator.manual_seed(int(seed))
        normal[row] = torch.randn((k + 1) * flat, generator=generator).view(k + 1, *latent_shape)
        t[row] = times_of(k, generator, part, process.length)
    return Draws(posterior=normal[:, 0], noise=normal[:, 1:], timesteps=t)


def per_record_loss(
    denoiser: nn.Module,
    process: Process,
    *,
    moments: Tensor,
    scale: LatentScale,
    conditions: Conditions,
    draws: Draws,
) -> Tensor:
    """Denoising loss of each record, averaged over its draws and over latent elements.

    Args:
        denoiser: The network.
        process: How it was trained.
        moments: (n, 2C, h, w) mean and log-variance of the VAE posterior.
        scale: The VAE's latent scale.
        conditions: n of them, in the denoiser's precision and on its device.
        draws: Randomness for the n records on any device.

    Returns:
        (n,) float32. Row i depends on record i alone, so its gradient is the per-sample gradient.
    """
    n, k = draws.timesteps.shape
    device = conditions.device
    states = conditions.states
    dtype = next(denoiser.parameters()).dtype if states is None else states.dtype
    mean, log_variance = moments.to(device, torch.float32).chunk(2, dim=1)
    std = torch.exp(
        0.5 * log_variance.clamp(-30.0, 20.0)
    )  # the clamp of diffusers' DiagonalGaussianDistribution
    latents = scale.scale(mean + std * draws.posterior.to(device))
    latents = latents.repeat_interleave(k, dim=0)
    noise = draws.noise.to(device).flatten(0, 1)
    times = draws.timesteps.to(device).flatten()
    noisy = process.noisy(latents, noise, times)
    target = process.target(latents, noise, times)
    told = process.told(times)
    predicted = predict(denoiser, noisy.to(dtype), told, conditions.repeat_interleave(k))
    errors = (predicted - target).square().flatten(1).mean(1)
    weights = process.weights(times)
    if weights is not None:
        errors = errors * weights
    return errors.view(n, k).mean(1)
