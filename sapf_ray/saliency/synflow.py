"""SynFlow: a saliency that looks at no data, and so costs no privacy budget (paper Table 15; Tanaka
et al. 2020).

With every parameter replaced by its magnitude and an input of ones, R is the sum of the outputs.
The worth of a weight is ``|w * dR/dw|``, the flow through it, and that of a matrix the sum over its
weights. Taken once, such scores remove whole layers; they are therefore taken ``saliency.rounds``
times, each time without the matrices left out so far (Tanaka et al., algorithm 1).

The paper says nothing of how it applies this to a diffusion model. A denoiser has inputs besides
the latents: ours are the time 0 and one prompt token of ones (class 0 for a class-conditional
transformer). Its normalisation layers and attention weights are left in place, so flow is not
conserved exactly, and a query or key in front of identical tokens gets no flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapf_ray.grad_sample.capture import Pool, PoolCapture
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
            flow = (
                torch.func.functional_call(denoiser, magnitudes, (), ones(denoiser))[0]
                .float()
                .sum()
            )
            flow.backward()
        left = set(kept)
        scores = capture.norms()[0].cpu() * torch.tensor([name in left for name in names])
        kept = top_n(names, scores, n=size)
    return scores


def ones(denoiser: Any) -> dict[str, Any]:
    """One input of ones, as keyword arguments."""
    config = denoiser.config
    dtype, device = denoiser.dtype, denoiser.device
    latents = torch.ones(
        1, config.in_channels, config.sample_size, config.sample_size, dtype=dtype, device=device
    )
    time = torch.zeros(1, dtype=torch.int64, device=device)
    width = getattr(config, "cross_attention_dim", None)
    if isinstance(width, int) and not hasattr(config, "num_embeds_ada_norm"):
        condition = {"encoder_hidden_states": torch.ones(1, 1, width, dtype=dtype, device=device)}
    else:
        condition = {"class_labels": time}
    model_input = "sample" if hasattr(config, "down_block_types") else "hidden_states"
    return {model_input: latents, "timestep": time, **condition, "return_dict": False}
