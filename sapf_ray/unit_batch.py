"""What the loss of some units of privacy is computed from, in selection and in fine-tuning.

A unit is a record, one image, or a group of images (:mod:`sapf_ray.data.units`). Of either the
loss is the mean over its draws, so its gradient is one vector, clipped once. A record's k draws are
of its one image, a group's are spread over its images: rows of the batch lie unit by unit, k each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from sapf_ray.latents import LatentCache
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import Draws, draw, per_record_loss
from sapf_ray.models.processes import Process
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey


@dataclass(frozen=True, kw_only=True)
class UnitBatch:
    """n units with their draws.

    Attributes:
        moments: (m, 2C, h, w) of the VAE posteriors; m is n for records, n·k for groups.
        conditions: m of them.
        labels: (m,) int64 classes.
        draws: Randomness for the m rows: k draws each for records, one for groups.
        n: Number of units.
    """

    moments: Tensor
    conditions: Conditions
    labels: Tensor
    draws: Draws
    n: int

    @classmethod
    def read(
        cls,
        cache: LatentCache,
        units: np.ndarray,
        *,
        key: NoiseKey,
        purpose: str,
        step: int,
        k: int,
        process: Process,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> UnitBatch:
        """Reads the units' images with draws that depend on (key, purpose, step, unit) only.

        Args:
            cache: The encoded images.
            units: (n,) int64 records, or groups where the cache has groups.
            key: The run's bound key.
            purpose: Name of the use.
            step: Number of the release.
            k: Draws of a unit.
            process: The forward process.
            part: Where times are drawn, as shares of the diffusion.
        """
        rows, images = units, units
        groups = cache.groups
        if groups is not None:
            images = groups.draw(key, purpose, step, units, k=k).ravel()
            rows = (np.asarray(units)[:, None] * k + np.arange(k)).ravel()
        draws = draw(
            key,
            purpose,
            step,
            rows,
            k=k if groups is None else 1,
            latent_shape=cache.latent_shape,
            process=process,
            part=part,
        )
        moments, conditions = cache.read(images)
        return cls(
            moments=moments,
            conditions=conditions,
            labels=cache.labels(images),
            draws=draws,
            n=len(units),
        )

    def with_a_row_per_draw(self) -> UnitBatch:
        """The same batch in a group's form: each draw with a row of its own."""
        n, k = self.draws.timesteps.shape
        return UnitBatch(
            moments=self.moments.repeat_interleave(k, dim=0),
            conditions=self.conditions.repeat_interleave(k),
            labels=self.labels.repeat_interleave(k),
            draws=Draws(
                posterior=self.draws.posterior.repeat_interleave(k, dim=0),
                noise=self.draws.noise.flatten(0, 1).unsqueeze(1),
                timesteps=self.draws.timesteps.view(n * k, 1),
            ),
            n=n,
        )

    def losses(
        self, denoiser: nn.Module, process: Process, *, scale: LatentScale, conditions: Conditions
    ) -> Tensor:
        """(n,) denoising loss of each unit, the mean over its draws.

        Args:
            denoiser: The network.
            process: How it was trained.
            scale: The VAE's latent scale.
            conditions: The batch's, in the denoiser's precision and on its device.
        """
        losses = per_record_loss(
            denoiser,
            process,
            moments=self.moments,
            scale=scale,
            conditions=conditions,
            draws=self.draws,
        )
        return losses if len(losses) == self.n else losses.view(self.n, -1).mean(1)
