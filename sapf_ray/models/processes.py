"""How a public model was trained: what noise does to latents, what the denoiser is to say of it,
and at which times.

Two kinds. *Diffusion* adds noise on DDPM's schedule; the target is the noise, the velocity or the
clean latents. *Flow matching* goes straight from latents x to noise n,

    x_t = (1 - s) x + s n,        target n - x,        s in (0, 1],

with s from the scheduler's own, possibly shifted, table. Times are whole numbers from 0, the clean
end, to T - 1 for both, so that the same draws serve both.

References:
    1. Ho, Jain, Abbeel. Denoising diffusion probabilistic models. NeurIPS 2020.
    2. Esser et al. Scaling rectified flow transformers for high-resolution image synthesis. ICML
       2024. (flow matching; times by a logit-normal density, section 3.1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sapf_ray.models.families import FlowMatching, family_of


class Process(Protocol):
    """A forward process with its loss; all arguments (n, ...) of n rows, times int64 (n,)."""

    @property
    def length(self) -> int:
        """T, number of times."""

    @property
    def density(self) -> str:
        """Row of :data:`DENSITIES` from which training draws times."""

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents with noise, float32 (n, C, h, w)."""

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser is to predict, float32 (n, C, h, w)."""

    def told(self, times: Tensor) -> Tensor:
        """(n,) times as the denoiser is told them."""

    def weights(self, times: Tensor) -> Tensor | None:
        """(n,) float32 factor of each squared error; None where all are 1."""


@dataclass(frozen=True)
class Diffusion:
    """DDPM's."""

    scheduler: DDPMScheduler
    density: str = "uniform"

    @property
    def length(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, times)

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, times)
        return clean if kind == "sample" else noise

    def told(self, times: Tensor) -> Tensor:
        return times

    def weights(self, times: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Flow:
    """Flow matching, with the family's density and weighting."""

    scheduler: FlowMatchEulerDiscreteScheduler
    flow: FlowMatching

    @property
    def density(self) -> str:
        return self.flow.density

    @property
    def length(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def shares(self, times: Tensor) -> Tensor:
        """(n,) float32 s, the share of noise: the scheduler's table runs from noise to clean."""
        return self.scheduler.sigmas.to(times.device)[self.length - 1 - times]

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        share = self.shares(times).view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - clean

    def told(self, times: Tensor) -> Tensor:
        return self.shares(times) * self.length

    def weights(self, times: Tensor) -> Tensor | None:
        """A loss of clean latents, x_t - s v against x, is that of velocities times s^2."""
        return self.shares(times).square() if self.flow.of_clean else None


def forward_process(pipe: Any) -> Process:
    """The process that the pipeline's model was trained with, as diffusers' scripts have it."""
    flow = family_of(pipe).flow
    config = pipe.scheduler.config
    if flow is None:
        return Diffusion(DDPMScheduler.from_config(config))
    return Flow(FlowMatchEulerDiscreteScheduler.from_config(config), flow)


Draw = Callable[[int, torch.Generator, tuple[float, float], int], Tensor]


def uniform_times(
    k: int, generator: torch.Generator, part: tuple[float, float], length: int
) -> Tensor:
    """k times, all of the part alike."""
    first, last = floor(part[0] * length), ceil(part[1] * length)
    return torch.randint(first, last, (k,), generator=generator)


def logit_normal_times(
    k: int, generator: torch.Generator, part: tuple[float, float], length: int
) -> Tensor:
    """k times of which the middle ones are likelier: u = sigmoid(z), z standard normal [2],
    restricted to the part.
    """
    low, high = torch.special.ndtr(torch.logit(torch.tensor(part, dtype=torch.float64)))
    uniform = torch.rand(k, generator=generator, dtype=torch.float64)
    share = torch.sigmoid(torch.special.ndtri(low + (high - low) * uniform))
    first, last = floor(part[0] * length), ceil(part[1] * length)
    return (share * length).long().clamp(first, last - 1)


DENSITIES: dict[str, Draw] = {"uniform": uniform_times, "logit_normal": logit_normal_times}
"""How training times are drawn: (k, generator, part of the diffusion, T) to int64 (k,)."""
