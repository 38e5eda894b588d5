"""The space in which a record's nearest candidate is found. Every network here is public.

Example::

    embed = make_embedding(EvolutionConfig(embedding="glyph"), ModelConfig(), batch_size=50)
    embed(images).shape         # (n, d) float32 from uint8 (n, R, R, 3)

References:
    1. Lin et al. ICLR 2024. (Inception-v3 features)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sapf_ray.config import EvolutionConfig, ModelConfig
from sapf_ray.evolution.api import latent_means
from sapf_ray.evolution.embedding_table import EMBEDDINGS
from sapf_ray.models.device import pick_device
from sapf_ray.models.inception import check_inception_weights, kept_inception
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.public_features import in_batches, kept_glyphs, to_pixels

MAX_LATENT_SIDE = 16


class Embedding(Protocol):
    """Must pickle; row i must depend on sample i alone."""

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Samples (n, ...) → float32 (n, d)."""


@dataclass(frozen=True, kw_only=True)
class VaeEmbedding:
    """Latent mean of the public model's VAE, averaged down to at most 16 x 16 positions."""

    model: ModelConfig
    batch_size: int = 50
    gpus: float = 0.0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        pipe = kept_pipeline(self.model, pick_device(self.gpus))

        def embed(images: np.ndarray) -> Tensor:
            latents = latent_means(pipe, images)
            side = min(MAX_LATENT_SIDE, *latents.shape[-2:])
            return F.adaptive_avg_pool2d(latents, side).flatten(1)

        return in_batches(embed, samples, size=self.batch_size)


@dataclass(frozen=True)
class GlyphEmbedding:
    """Features of the shipped network, trained on public rendered characters; for digit-like
    images.
    """

    batch_size: int = 50
    gpus: float = 0.0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        device = pick_device(self.gpus)
        net = kept_glyphs(device)
        return in_batches(
            lambda images: net.features(to_pixels(images, device).float() / 255),
            samples,
            size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class InceptionEmbedding:
    """Inception-v3 pool features as torch-fidelity computes them, the same as for FID."""

    weights: str
    batch_size: int = 50
    gpus: float = 0.0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        device = pick_device(self.gpus)
        net = kept_inception(self.weights, device)
        return in_batches(
            lambda images: net(to_pixels(images, device))[0], samples, size=self.batch_size
        )


def make_vae(config: EvolutionConfig, model: ModelConfig, batch_size: int) -> Embedding:
    """Row ``vae`` of the table."""
    return VaeEmbedding(model=model, batch_size=batch_size, gpus=config.gpus)


def make_glyph(config: EvolutionConfig, model: ModelConfig, batch_size: int) -> Embedding:
    """Row ``glyph`` of the table; it needs no public model."""
    return GlyphEmbedding(batch_size, config.gpus)


def make_inception(config: EvolutionConfig, model: ModelConfig, batch_size: int) -> Embedding:
    """Row ``inception`` of the table; it needs no public model.

    Raises:
        DataError: Weights that cannot be used.
    """
    check_inception_weights(config.inception_weights, "evolution.inception_weights")
    return InceptionEmbedding(
        weights=str(config.inception_weights), batch_size=batch_size, gpus=config.gpus
    )


def make_embedding(config: EvolutionConfig, model: ModelConfig, *, batch_size: int) -> Embedding:
    """The embedding that the config names. Reads no record; call it before a run spends anything.

    Args:
        config: Names the embedding.
        model: The public model.
        batch_size: Number of images per forward pass.

    Raises:
        ConfigError: No such embedding.
        DataError: Inception weights that cannot be used.
    """
    return EMBEDDINGS[config.embedding](config, model, batch_size)
