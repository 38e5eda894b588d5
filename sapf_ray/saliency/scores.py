"""Saliency scores: what each record contributes, and how the noisy sum ranks the matrices.

A score is a row of :data:`SCORES`. Every contribution has L2 norm at most ``clipping_norm``, so the sum over
records has that sensitivity under add/remove of one record, and one Gaussian draw of std
``noise_multiplier * clipping_norm`` per coordinate pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sapf_ray.config import SaliencyConfig
from sapf_ray.privacy.noise import clip_factors, clipped_sum
from sapf_ray.saliency.engine import Pool, PoolCapture

Release = list[Tensor]


@dataclass(frozen=True)
class Score:
    """One saliency score.

    Attributes:
        keep_gradients: Whether the contribution needs the gradients and not only their norms.
        contribution: (capture, clip factors (B,)) to this batch's clipped sum.
        zero: Pool to an all-zero release.
        rank: Noisy sum to one value per matrix, larger is more salient.
    """

    keep_gradients: bool
    contribution: Callable[[PoolCapture, Tensor], Release]
    zero: Callable[[Pool], Release]
    rank: Callable[[Release], Tensor]


def _norm_contribution(capture: PoolCapture, factors: Tensor) -> Release:
    return [clipped_sum(capture.norms(), factors).cpu()]


SCORES: dict[str, Score] = {
    # design section 5: per record the vector of its K gradient norms, scaled into the unit ball
    "per_sample_norm": Score(
        keep_gradients=False,
        contribution=_norm_contribution,
        zero=lambda pool: [torch.zeros(len(pool))],
        rank=lambda release: release[0],
    ),
    # paper eqs. 6-8: joint clipping of the concatenated pool gradient, norm of the noisy mean per matrix
    "noisy_mean_gradient": Score(
        keep_gradients=True,
        contribution=lambda capture, factors: [s.cpu() for s in capture.clipped_sum(factors)],
        zero=lambda pool: [torch.zeros_like(layer.weight, dtype=torch.float32, device="cpu") for layer in pool.values()],
        rank=lambda release: torch.stack([matrix.norm() for matrix in release]),
    ),
}


def clipped_contribution(score: Score, capture: PoolCapture, config: SaliencyConfig) -> Release:
    """The batch's clipped sum; each record bounded by ``config.clipping_norm`` over the whole pool."""
    joint = capture.norms().norm(dim=1)
    factors = clip_factors(joint, config.clipping_norm, config.clipping, config.clipping_gamma)
    return score.contribution(capture, factors)


def n_selected(pool_size: int, ratio: float) -> int:
    """``ceil(ratio * K)``, robust to 0.3 * 10 = 3.0000000000000004; at least 1."""
    return max(1, math.ceil(round(ratio * pool_size, 9)))


def top_matrices(names: list[str], scores: Tensor, ratio: float) -> list[str]:
    """Names of the ``ceil(ratio * K)`` largest scores, in the pool's order; ties go to the earlier matrix."""
    order = sorted(range(len(names)), key=lambda i: (-float(scores[i]), i))
    kept = set(order[: n_selected(len(names), ratio)])
    return [name for i, name in enumerate(names) if i in kept]
