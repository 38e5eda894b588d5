"""Solvers: what turns noise into latents, step by step, and at which times."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sapf_ray.models.conditioning import CONDITIONINGS, denoiser_of
from sapf_ray.models.families import family_of
from sapf_ray.models.processes import forward_process


def solver(pipe: Any) -> Any:
    """A fresh DPM-Solver++ on the noise schedule the model was trained with; for a model of flow
    matching a fresh solver of its own pipeline's kind.
    """
    # from_config warns about each entry of the training scheduler that the solver has no use for
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    config = pipe.scheduler.config
    if family_of(pipe).flow is not None:
        return type(pipe.scheduler).from_config(config)
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


def set_steps(pipe: Any, scheduler: Any, *, steps: int, side: int) -> None:
    """Sets a whole trajectory of so many steps, as the stock pipeline does.

    Args:
        pipe: The public pipeline.
        scheduler: Its solver.
        steps: Number of steps.
        side: Of the latents: the larger, the longer some models stay at much noise.
    """
    flow = family_of(pipe).flow
    device = denoiser_of(pipe).device
    if flow is not None and flow.even and not scheduler.config.get("use_flow_sigmas"):
        shares = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=shares, device=device, **_shift(pipe, scheduler, side))
    else:
        scheduler.set_timesteps(steps, device=device, **_shift(pipe, scheduler, side))


def part_way(
    pipe: Any, clean: Tensor, noise: Tensor, *, strength: float, steps: int
) -> tuple[Any, Tensor]:
    """A solver from part of the way on, and latents with as much noise as it starts from.

    The time is set exactly, not rounded to one of ``steps`` solver steps, so slowly falling
    strengths differ.

    Args:
        pipe: The public pipeline.
        clean: (n, C, h, w) scaled latents.
        noise: Standard normal of the same shape.
        strength: In (0, 1), where on the way from the clean end.
        steps: Solver steps of a whole trajectory; ceil(strength * steps) are taken.
    """
    count = max(1, int(np.ceil(strength * steps)))
    device = denoiser_of(pipe).device
    if family_of(pipe).flow is not None:
        # Sana's published scheduler, a DPM-Solver, takes no shares of noise; Euler does
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, shift=_own_shift(pipe.scheduler.config)
        )
        shares = np.linspace(strength, strength / count, count)
        shift = _shift(pipe, scheduler, clean.shape[-1])
        scheduler.set_timesteps(sigmas=shares, device=device, **shift)
        share = scheduler.sigmas[0].to(clean.device)
        return scheduler, (1 - share) * clean + share * noise
    process = forward_process(pipe)
    scheduler = solver(pipe)
    first = max(1, round(strength * (process.length - 1)))
    # evenly from the first time downwards, 0 left out; two may round to one
    times = np.unique(np.linspace(0, first, count + 1)[1:].round().astype(np.int64))[::-1]
    scheduler.set_timesteps(timesteps=times.tolist(), device=device)
    start = torch.full((len(clean),), first, device=clean.device)
    return scheduler, process.noisy(clean, noise, start)


def _own_shift(config: Any) -> float:
    """How far a scheduler of flow matching stays at much noise, under either of its names."""
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def _shift(pipe: Any, scheduler: Any, side: int) -> dict[str, float]:
    """The exponent of a shift that depends on the number of tokens (``calculate_shift`` in
    diffusers), where the scheduler asks for it.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    packed = CONDITIONINGS[family_of(pipe).conditioning].pack
    patch = packed * denoiser_of(pipe).config.patch_size
    few = config.get("base_image_seq_len", 256)
    many = config.get("max_image_seq_len", 4096)
    low = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", 1.15) - low) / (many - few)
    return {"mu": low + slope * ((side // patch) ** 2 - few)}
