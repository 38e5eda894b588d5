"""SynFlow: a saliency that looks at no data, and so costs no privacy budget (paper Table 15; Tanaka
et al. 2020).

With every parameter replaced by its magnitude and an input of ones, R is the sum of the outputs.
The worth of a weight is ``|w * dR/dw|``, the flow through it, and that of a matrix the sum over its
weights. Taken once, such scores remove whole layers; they are therefore taken ``saliency.rounds``
times, each time without the matrices left out so far (Tanaka et al., algorithm 1).

The paper says nothing of how it applies this to a diffusion model. A denoiser has inputs besides
the latents: ours are the time 0 and one prompt token of ones, with all else that it is told at one
(class 0 for a class-conditional transformer). Its normalisation layers and attention weights are
left in place, so flow is not conserved exactly, and a query or key in front of identical tokens
gets no flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapf_ray.grad_sample.capture import Pool, PoolCapture
from sapf_ray.models.calls import DenoiserCall
from sapf_ray.models.conditioning import CONDITIONINGS, blank_conditions, kind_of_denoiser
from sapf_ray.models.conditions import Conditions
from sapf_ray.saliency.scores import schedule, top_n


def synflow_scores(denoiser: nn.Module, pool: Pool, *, n: int, rounds: int) -> Tensor:
    """(K,) scores, 0 for matrices left out before the last round.

    Args:
        denoiser: Frozen, in evaluation mode; not changed.
        pool: Its matrices.
        n: Matrices to keep in the end.
        rounds: At least 1.
    """
    names = list(pool)
    magnitudes = {name: p.detach().abs() for name, p in denoiser.named_parameters()}
    kept, scores = names, torch.zeros(len(names))
    for size in schedule(len(names), n, rounds):
        with PoolCapture(pool, weighted=True, pruned=set(names) - set(kept)) as capture:
            call, inputs = ones(denoiser)
            flow = call(_With(denoiser, magnitudes), *inputs).float().sum()
            flow.backward()
        left = set(kept)
        scores = capture.norms()[0].cpu() * torch.tensor([name in left for name in names])
        kept = top_n(names, scores, n=size)
    return scores


class _With:
    """A network that is called with other values of its parameters."""

    def __init__(self, denoiser: Any, values: dict[str, Tensor]) -> None:
        self.denoiser = denoiser
        self.values = values
        self.config = denoiser.config

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.denoiser, self.values, inputs, options)


def ones(denoiser: Any) -> tuple[DenoiserCall, tuple[Tensor, Tensor, Conditions]]:
    """How the network is called, and one input: latents of ones, time 0 and its conditions."""
    config = denoiser.config
    dtype, device = denoiser.dtype, denoiser.device
    kind = kind_of_denoiser(denoiser)
    row = CONDITIONINGS[kind]
    time = torch.zeros(1, dtype=torch.int64, device=device)
    channels = config.in_channels // row.pack**2
    side = getattr(config, "sample_size", None) or row.pack
    latents = torch.ones(1, channels, side, side, dtype=dtype, device=device)
    conditions = Conditions(kind=kind, labels=time)
    if kind != "labels":
        conditions = blank_conditions(kind, config, device=device, tokens=1).to(device, dtype)
    return row.call, (latents, time, conditions)
