"""The worker's loop: Poisson batch -> per-sample gradients -> clip -> sum -> noise -> step.

``train`` runs in any process that has a torch process group; Ray Train is one caller, the
benchmark's bare process another. It reports nothing that depends on the data outside the mechanism:
no losses, no norms, no realised batch sizes (design rule 6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sapf_ray.config import FinetuneConfig, ModelConfig
from sapf_ray.errors import SapfError
from sapf_ray.finetune.adapter import (
    SampleGradients,
    add_adapter,
    load_factors,
    sample_gradients,
    save_weights,
)
from sapf_ray.finetune.micro_batch import find_micro_batch
from sapf_ray.finetune.optimizer import ReleaseOptimizer
from sapf_ray.latents import LatentCache
from sapf_ray.models.conditioning import denoiser_of, to_denoiser
from sapf_ray.models.denoising import Draws, draw, per_record_loss, training_scheduler
from sapf_ray.models.loading import load_pipeline
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, plan_events
from sapf_ray.privacy.sampling import poisson_sample, shard


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """Everything a worker needs; sensitive values are reached through ``cache`` and ``key`` only."""

    model: ModelConfig
    matrices: list[str]
    cache: LatentCache
    plan: PrivacyPlan
    config: FinetuneConfig
    key: NoiseKey
    stream: str
    ledger: str
    seed: int
    device: str = "cpu"


@dataclass(kw_only=True)
class TrainState:
    """What a checkpoint holds; all of it is post-processing of noisy releases."""

    step: int
    factors: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict
    micro_batch_size: int

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, content: IO[bytes], name: str) -> TrainState:
        """Reads what :meth:`save` wrote; ``name`` is for the error."""
        try:
            return cls(**torch.load(content, map_location="cpu", weights_only=True))
        except Exception as error:
            raise SapfError(
                f"{name}: damaged checkpoint ({' '.join(str(error).split())[:200]})"
            ) from error


def ema_decay(decay: float, step: int) -> float:
    """Warm-up of the moving average: early iterates are forgotten fast."""
    return min(decay, (1 + step) / (10 + step))


def parameters_digest(factors: dict[str, nn.Parameter]) -> bytes:
    """SHA-256 over the factors' bytes: equal on every rank, or training is broken."""
    digest = hashlib.sha256()
    for value in factors.values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.digest()


def assert_ranks_agree(factors: dict[str, nn.Parameter]) -> None:
    """Raises if any rank's factors differ from rank 0's."""
    digests: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, parameters_digest(factors))
    if len(set(digests)) != 1:
        raise RuntimeError(
            "ranks disagree on the adapter: the noisy gradient was not the same everywhere"
        )


def train(
    job: FinetuneJob,
    resume: TrainState | None = None,
    on_checkpoint: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Runs the remaining steps and returns the final state (identical on every rank).

    Args:
        job: The work; ``job.plan.finetune`` fixes noise, rate and steps.
        resume: State of an earlier checkpoint.
        on_checkpoint: Called on every rank each ``checkpoint_every`` steps and after the last.

    Raises:
        BudgetError: On rank 0, before the step that would pass the planned epsilon.
    """
    assert job.plan.finetune is not None
    config, rank, world = job.config, dist.get_rank(), dist.get_world_size()
    objective = _Objective.load(job)
    factors = add_adapter(objective.denoiser, job.matrices, config=config, seed=job.seed)
    objective.denoiser.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = sample_gradients(objective.denoiser, factors, config=config)
    ledger = Ledger.open(job.ledger) if rank == 0 else None
    (event,) = [event for stage, event, _ in plan_events(job.plan) if stage == "finetune"]

    def before_release(step: int) -> None:
        assert ledger is not None
        ledger.record(f"finetune/step/{step}", event, job.stream, "finetune")

    optimizer = ReleaseOptimizer(
        torch.optim.AdamW(
            factors.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        ),
        noise_multiplier=job.plan.finetune.noise_multiplier,
        clipping=config.clipping,
        clipping_norm=config.clipping_norm,
        clipping_gamma=config.clipping_gamma,
        expected_batch_size=config.batch_size,
        before_release=before_release,
        non_private=job.plan.non_private,
        noise_stream=lambda step: job.key.stream("finetune/noise", step),
    )
    average = {name: p.detach().clone() for name, p in factors.items()}
    if resume is not None:
        load_factors(objective.denoiser, resume.factors)
        average = {name: value.to(job.device) for name, value in resume.average.items()}
        optimizer.load_state_dict(resume.optimizer)
        optimizer.next_step = resume.step

    micro = (
        resume.micro_batch_size
        if resume
        else config.micro_batch_size or _common_micro_batch(objective, gradients)
    )

    def state() -> TrainState:
        return TrainState(
            step=optimizer.next_step,
            factors={n: p.detach().cpu().clone() for n, p in factors.items()},
            average={n: a.cpu().clone() for n, a in average.items()},
            optimizer=optimizer.state_dict(),
            micro_batch_size=micro,
        )

    for step in range(optimizer.next_step, config.steps):
        # every rank draws the same whole-data-set Poisson sample and takes its own part of it
        sampled = poisson_sample(
            job.plan.n_records,
            job.plan.sample_rate,
            generator=job.key.stream("finetune/sample", step),
        )
        mine = shard(sampled, rank, world)
        for start in range(0, len(mine), micro):
            losses = objective.losses(mine[start : start + micro], step)
            optimizer.accumulate(gradients.clipped_sums(losses, optimizer.clip))
        optimizer.release_step()
        decay = ema_decay(config.ema_decay, step)
        with torch.no_grad():
            for name, p in factors.items():
                average[name].lerp_(p, 1 - decay)
        if on_checkpoint and (
            (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
        ):
            assert_ranks_agree(factors)
            on_checkpoint(state())
    return state()


@dataclass(kw_only=True)
class _Objective:
    """The denoising loss of records, as training and the search for its micro-batch size call it."""

    job: FinetuneJob
    denoiser: nn.Module
    scheduler: DDPMScheduler
    scaling_factor: float

    @classmethod
    def load(cls, job: FinetuneJob) -> _Objective:
        """The denoiser alone goes on: VAE and text encoder have done their work in the latent
        cache.
        """
        pipe = load_pipeline(
            job.model.path, job.model.dtype if job.config.adapter == "lora" else "float32"
        )
        return cls(
            job=job,
            denoiser=denoiser_of(pipe),
            scheduler=training_scheduler(pipe),
            scaling_factor=pipe.vae.config.scaling_factor,
        )

    def losses(self, records: np.ndarray, step: int) -> Tensor:
        """(n,) losses of the named records with the draws of this step."""
        job = self.job
        draws = draw(
            job.key,
            "finetune/loss",
            step,
            records,
            job.config.draws_per_record,
            job.cache.latent_shape,
            self.scheduler.config.num_train_timesteps,
            (job.config.timestep_start, job.config.timestep_end),
        )
        return self._losses(*job.cache.read(records), draws=draws)

    def random_losses(self, n: int) -> Tensor:
        """(n,) losses of random numbers in the shape of records; reads none."""
        job, (channels, height, width) = self.job, self.job.cache.latent_shape
        k = job.config.draws_per_record
        noise = torch.zeros(n, k, channels, height, width)
        draws = Draws(
            posterior=noise[:, 0], noise=noise, timesteps=torch.zeros(n, k, dtype=torch.int64)
        )
        return self._losses(
            torch.zeros(n, 2 * channels, height, width), job.cache.any_conditions(n), draws=draws
        )

    def _losses(self, moments: Tensor, conditions: Tensor, *, draws: Draws) -> Tensor:
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        conditions = to_denoiser(conditions, self.job.device, dtype=dtype)
        return per_record_loss(
            self.denoiser,
            self.scheduler,
            moments=moments,
            scaling_factor=self.scaling_factor,
            conditions=conditions,
            draws=draws,
        )


def _common_micro_batch(objective: _Objective, gradients: SampleGradients) -> int:
    """The smallest of the ranks' best micro-batch sizes."""
    job = objective.job
    limit = min(1024, max(1, job.plan.batch_size // dist.get_world_size()))
    best = find_micro_batch(
        lambda n: gradients.clipped_sums(objective.random_losses(n), torch.ones_like),
        limit,
        device=job.device,
    )
    size = torch.tensor(best, device=job.device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN)
    return int(size)


def write_adapter(job: FinetuneJob, state: TrainState, *, directory: Path) -> None:
    """Writes what the stage releases, out of its last state."""
    denoiser = denoiser_of(load_pipeline(job.model.path, job.model.dtype))
    add_adapter(denoiser, job.matrices, config=job.config, seed=job.seed)
    save_weights(denoiser, directory, values=state.average, config=job.config)
