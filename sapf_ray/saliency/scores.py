"""Saliency scores: what each record contributes, and how the noisy sum ranks the matrices.

A score is a row of :data:`SCORES`. Every contribution has norm at most ``clipping_norm`` (L2 for
the Gaussian mechanism, L-infinity for those that need no more), so the sum over records has that
sensitivity under add/remove of one record, and the mechanism's one draw pays for it.

The paper's Table 15 compares with three scores from network pruning, and says neither how they were
made private nor how they rank matrices instead of single weights. Ours:

- ``snip`` [1]: the worth of a weight is ``|w * dL/dw|``, of a matrix the sum over its weights. SNIP
  takes the gradient of the mean loss; we take each record's own, so that a record contributes K
  numbers, clipped and summed like those of ``per_sample_norm``, and the noise stays as small.
- ``force`` [2]: the same number in a network from which matrices are taken away step by step (here:
  count as zero), K to ``ratio * K`` of them on an exponential schedule. Worth is that of the
  original weights at the pruned network's gradients, so a matrix can come back. Each step reads the
  data: each is a release of its own, all are charged. The paper's Table 15 has FORCE take five
      times as long as SNIP, hence ``saliency.rounds`` of 5.
- ``synflow`` [3]: no data at all, see :mod:`sapf_ray.saliency.synflow`.

1. Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR
   2019, eqs. 5-6.
2. de Jorge et al., "Progressive skeletonization: trimming more fat from a network at
   initialization", ICLR 2021, eqs. 7-9.
3. Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
   conserving synaptic flow", NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from sapf_ray.config import SaliencyConfig
from sapf_ray.grad_sample.capture import Pool, PoolCapture
from sapf_ray.models.pool import layer_of
from sapf_ray.privacy.noise import clip_factors, clipped_sum

Release = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One saliency score.

    Attributes:
        contribution: (capture, clip factors (B,)) to this batch's clipped sum.
        zero: Pool to an all-zero release.
        rank: Noisy sum to one value per matrix, larger is more salient.
        keep_gradients: Whether the contribution needs the gradients and not only their norms.
        weighted: Whether norms are those of weight times gradient.
        iterative: Whether it is taken ``saliency.rounds`` times, each time without the matrices
            left out so far.
    """

    contribution: Callable[[PoolCapture, Tensor], Release]
    zero: Callable[[Pool], Release]
    rank: Callable[[Release], Tensor]
    keep_gradients: bool = False
    weighted: bool = False
    iterative: bool = False

    def capture(self, pool: Pool, closed: Collection[str] = ()) -> PoolCapture:
        """The hooks that see what this score needs."""
        return PoolCapture(pool, keep=self.keep_gradients, weighted=self.weighted, pruned=closed)


def _per_matrix(weighted: bool = False, iterative: bool = False) -> Score:
    """Per record the vector of its K norms, scaled into the ball (design section 5)."""
    return Score(
        contribution=lambda capture, factors: [clipped_sum(capture.norms(), factors).cpu()],
        zero=lambda pool: [torch.zeros(len(pool))],
        rank=lambda release: release[0],
        weighted=weighted,
        iterative=iterative,
    )


SCORES: dict[str, Score] = {
    "per_sample_norm": _per_matrix(),
    # paper eqs. 6-8: joint clipping of the concatenated pool gradient, norm of the noisy mean per
    # matrix
    "noisy_mean_gradient": Score(
        contribution=lambda capture, factors: [s.cpu() for s in capture.clipped_sum(factors)],
        zero=lambda pool: [
            torch.zeros_like(layer.weight, dtype=torch.float32, device="cpu")
            for layer in pool.values()
        ],
        rank=lambda release: torch.stack([matrix.norm() for matrix in release]),
        keep_gradients=True,
    ),
    "snip": _per_matrix(weighted=True),
    "force": _per_matrix(weighted=True, iterative=True),
}


def clipped_contribution(
    score: Score, capture: PoolCapture, *, config: SaliencyConfig, order: float = 2.0
) -> Release:
    """The batch's clipped sum; each record bounded by ``config.clipping_norm`` over the whole pool.

    Args:
        order: Of the norm of a record's K values that is bounded: 2 or infinity.
    """
    joint = torch.linalg.vector_norm(capture.norms(), order, dim=1)
    factors = clip_factors(
        joint, config.clipping_norm, mode=config.clipping, gamma=config.clipping_gamma
    )
    return score.contribution(capture, factors)


def n_selected(pool_size: int, ratio: float) -> int:
    """``ceil(ratio * K)``, robust to 0.3 * 10 = 3.0000000000000004; at least 1."""
    return max(1, math.ceil(round(ratio * pool_size, 9)))


def schedule(pool_size: int, kept: int, rounds: int) -> list[int]:
    """How many matrices are kept after each round: from K to ``kept``, exponentially (FORCE, eq.
    9).

    Example:
        >>> schedule(96, 29, 5)
        [76, 60, 47, 37, 29]
    """
    steps = [
        math.exp(math.log(pool_size) + t / rounds * math.log(kept / pool_size))
        for t in range(1, rounds + 1)
    ]
    return [math.ceil(round(step, 6)) for step in steps]


def top_matrices(
    names: list[str], scores: Tensor, *, ratio: float, granularity: str = "matrix"
) -> list[str]:
    """Names of the best ``ceil(ratio * K)`` matrices, in the pool's order; ties go to the earlier
    one.

    Args:
        names: K names.
        scores: (K,).
        granularity: ``matrix``; or ``layer`` (Layer-Level, paper Figure 4): the matrices' scores
            are summed over each layer (:func:`sapf_ray.models.pool.layer_of`) and whole layers are
            kept, best first, until they hold at least as many matrices. The paper does not say how
            it counts; this is the smallest set of whole layers.
    """
    return top_n(names, scores, n=n_selected(len(names), ratio), granularity=granularity)


def top_n(names: list[str], scores: Tensor, *, n: int, granularity: str = "matrix") -> list[str]:
    """As :func:`top_matrices`, for a number instead of a ratio."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(layer_of(name) if granularity == "layer" else name, []).append(i)
    values = scores.tolist()
    kept: set[int] = set()
    for group in sorted(
        groups.values(), key=lambda group: -sum(values[i] for i in group)
    ):  # stable: earlier first
        if len(kept) >= n:
            break
        kept.update(group)
    return [name for i, name in enumerate(names) if i in kept]
