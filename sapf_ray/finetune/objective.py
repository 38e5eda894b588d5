"""The denoising loss of records, as training and the search for its micro-batch size call it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sapf_ray.models.class_tokens import ClassTokens
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.denoising import Draws
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.processes import Process, forward_process
from sapf_ray.models.vae import LatentScale
from sapf_ray.unit_batch import UnitBatch

if TYPE_CHECKING:
    from sapf_ray.finetune.loop import FinetuneJob


@dataclass(kw_only=True)
class Objective:
    """What a step minimises.

    Attributes:
        job: The work.
        denoiser: The public denoiser; training adds to it.
        process: The forward process.
        scale: The VAE's latent scale.
        tokens: Class tokens, where they are trained.
    """

    job: FinetuneJob
    denoiser: nn.Module
    process: Process
    scale: LatentScale
    tokens: ClassTokens | None = None

    @classmethod
    def load(cls, job: FinetuneJob) -> Objective:
        """The denoiser alone goes on: VAE and text encoder have done their work in the latent
        cache.
        """
        model = job.model
        if job.config.adapter != "lora":  # trained weights are summed up in float32
            model = replace(model, dtype="float32")
        pipe = load_pipeline(model)
        return cls(
            job=job,
            denoiser=denoiser_of(pipe),
            process=forward_process(pipe),
            scale=LatentScale.of(pipe.vae),
        )

    def losses(self, records: np.ndarray, step: int) -> Tensor:
        """(n,) losses of the named records, or groups, with the draws of this step."""
        job = self.job
        batch = UnitBatch.read(
            job.cache,
            records,
            key=job.key,
            purpose="finetune/loss",
            step=step,
            k=job.config.draws_per_record,
            process=self.process,
            part=(job.config.timestep_start, job.config.timestep_end),
        )
        return self._losses(batch)

    def random_losses(self, n: int) -> Tensor:
        """(n,) losses of random numbers in the shape of records, the first always the same.

        No record is read.
        """
        job = self.job
        k = job.config.draws_per_record
        channels, height, width = job.cache.latent_shape
        numbers = np.random.default_rng(0).standard_normal(
            (n, k + 3, channels, height, width), dtype=np.float32
        )
        normal = torch.from_numpy(numbers)
        batch = UnitBatch(
            moments=normal[:, 1:3].flatten(1, 2),
            conditions=job.cache.any_conditions(n),
            labels=torch.zeros(n, dtype=torch.int64),
            draws=Draws(
                posterior=normal[:, 0],
                noise=normal[:, 3:],
                timesteps=torch.full((n, k), self.process.length // 2),
            ),
            n=n,
        )
        return self._losses(batch if job.cache.groups is None else batch.with_a_row_per_draw())

    def _losses(self, batch: UnitBatch) -> Tensor:
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        conditions = batch.conditions
        if self.tokens is not None:
            conditions = self.tokens.shift(conditions.to(self.job.device), batch.labels)
        return batch.losses(
            self.denoiser,
            self.process,
            scale=self.scale,
            conditions=conditions.to(self.job.device, dtype),
        )
