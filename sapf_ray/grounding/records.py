"""Records in the space in which they vote: as sensitive as the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sapf_ray.config import ModelConfig
from sapf_ray.evolution.api import latent_means
from sapf_ray.grounding.space import Features
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.runs.context import RunContext

SIDE = 8  # positions that latent features keep, each way
BLOCK = 4096  # records in memory together


@dataclass(frozen=True)
class LatentFeatures:
    """Latent mean of the public model's VAE, averaged down to at most 8 x 8 positions."""

    model: ModelConfig
    gpus: float = 0.0

    @property
    def key(self) -> str:
        """The weights are part of what the caller keys by."""
        return "latents"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            means = latent_means(kept_pipeline(self.model, pick_device(self.gpus)), images)
        return _pooled(means.cpu())


def feature_space(run: RunContext) -> Features:
    """The features in which this run's records are compared."""
    return LatentFeatures(run.config.model, run.config.synthesis.gpus_per_actor)


def record_features(run: RunContext) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of features (n, d) and labels (n,) of all records, from the latent cache."""
    moments = np.load(Path(run.latents) / "moments.npy", mmap_mode="r")
    labels = np.load(Path(run.latents) / "labels.npy", mmap_mode="r")
    channels = moments.shape[1] // 2
    for start in range(0, len(labels), BLOCK):
        means = torch.from_numpy(np.array(moments[start : start + BLOCK, :channels]))
        yield _pooled(means), np.array(labels[start : start + BLOCK])


def _pooled(means: torch.Tensor) -> np.ndarray:
    side = min(SIDE, *means.shape[-2:])
    return F.adaptive_avg_pool2d(means, side).flatten(1).numpy()
