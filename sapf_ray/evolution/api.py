"""The two things Private Evolution asks of a public model: fresh images, and variations of given
ones.

Both are public computations: they see prompts and synthetic images, never a record.

References:
    1. Lin et al. ICLR 2024. (RANDOM_API, VARIATION_API)
    2. Meng et al. SDEdit. ICLR 2022. (variation = noise an image up to some time, then denoise it)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sapf_ray.config import ModelConfig
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.solvers import part_way
from sapf_ray.models.vae import LatentScale, posterior_parameters
from sapf_ray.synthesis.sampler import decode_images, denoise, initial_noise, sample_images


class Api(Protocol):
    """A public generator. Must pickle; sample i must follow from (label, seed, parent) i alone."""

    def random(self, labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Fresh samples (n, ...) of the given classes, int64 (n,), from seeds in [0, 2**63)."""

    def vary(
        self, samples: np.ndarray, labels: np.ndarray, seeds: np.ndarray, strength: float
    ) -> np.ndarray:
        """Variations of ``samples`` (n, ...): the nearer ``strength`` to 0, the more alike; at 1
        fresh samples.
        """


@dataclass(frozen=True, kw_only=True)
class DiffusionApi:
    """Any text-to-image or class-conditional pipeline that loads; images uint8 (n, R, R, 3) at its
    resolution R.

    Args:
        model: The public model.
        prompts: One per class.
        steps: DPM-Solver++ steps of a fresh image.
        guidance_scale: 1 is none.
        batch_size: Images denoised together.
        gpus: Share of a GPU that the calling task holds; 0 computes on the CPU.
    """

    model: ModelConfig
    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    batch_size: int = 50
    gpus: float = 0.0

    def random(self, labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        pipe, context, empty = _loaded(self.model, self.prompts, device=pick_device(self.gpus))
        return _in_batches(
            self.batch_size,
            len(seeds),
            make=lambda rows: sample_images(
                pipe,
                context[labels[rows]],
                null=empty,
                seeds=seeds[rows],
                steps=self.steps,
                guidance_scale=self.guidance_scale,
            ),
        )

    def vary(
        self, samples: np.ndarray, labels: np.ndarray, seeds: np.ndarray, strength: float
    ) -> np.ndarray:
        if strength == 1:
            return self.random(labels, seeds)
        pipe, context, empty = _loaded(self.model, self.prompts, device=pick_device(self.gpus))
        return _in_batches(
            self.batch_size,
            len(seeds),
            make=lambda rows: vary_images(
                pipe,
                samples[rows],
                conditions=context[labels[rows]],
                null=empty,
                seeds=seeds[rows],
                strength=strength,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
            ),
        )


@torch.no_grad()
def vary_images(
    pipe: Any,
    images: np.ndarray,
    *,
    conditions: Conditions,
    null: Conditions,
    seeds: np.ndarray,
    strength: float,
    steps: int,
    guidance_scale: float,
) -> np.ndarray:
    """Each image noised up to diffusion time ``strength * T`` and denoised again under its prompt.

    Args:
        pipe: The public pipeline.
        images: uint8 (n, R, R, 3), R the pipeline's resolution.
        conditions: n of the images.
        null: One null condition; not used at guidance 1.
        seeds: n seeds in [0, 2**63); image i depends on seed i alone.
        strength: In (0, 1).
        steps: Solver steps of a whole trajectory; ceil(strength * steps) are taken.
        guidance_scale: 1 is none.

    Returns:
        uint8 (n, R, R, 3).
    """
    clean = LatentScale.of(pipe.vae).scale(latent_means(pipe, images))
    shape: Any = tuple(clean.shape[1:])
    noise = initial_noise(seeds, shape).to(denoiser_of(pipe).device)
    scheduler, latents = part_way(pipe, clean, noise, strength=strength, steps=steps)
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
def latent_means(pipe: Any, images: np.ndarray) -> Tensor:
    """Unscaled mean of the VAE posterior, float32 (n, C, h, w), of images uint8 (n, R, R, 3)."""
    pixels = torch.from_numpy(images).to(pipe.vae.device).permute(0, 3, 1, 2)
    parameters = posterior_parameters(pipe.vae, (pixels / 127.5 - 1).to(pipe.vae.dtype))
    return parameters.chunk(2, dim=1)[0].float()


@lru_cache(maxsize=1)
def _loaded(
    model: ModelConfig, prompts: tuple[str, ...], *, device: str
) -> tuple[Any, Conditions, Conditions]:
    pipe = kept_pipeline(model, device)
    return (
        pipe,
        encode_conditions(pipe, prompts, class_labels=model.class_labels),
        null_condition(pipe),
    )


def _in_batches(size: int, n: int, *, make: Any) -> np.ndarray:
    return np.concatenate([make(slice(start, start + size)) for start in range(0, n, size)])
