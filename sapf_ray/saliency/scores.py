"""Saliency scores: what each record contributes, and how the noisy sum ranks the matrices.

A score is a row of :data:`SCORES`. Every contribution has norm at most ``clipping_norm`` (L2 for
the Gaussian mechanism, L-infinity for those that need no more) and is a vector of integers on a
fixed-point grid, so the sum over records has that sensitivity under add/remove of one record, to
the last bit, and the mechanism's one draw pays for it. A data-free score reads no record.

The paper's Table 15 compares with three scores from network pruning, and says neither how they were
made private nor how they rank matrices instead of single weights. Ours:

- ``snip`` [1]: the worth of a weight is ``|w * dL/dw|``, of a matrix the sum over its weights. SNIP
  takes the gradient of the mean loss; we take each record's own, so that a record contributes K
  numbers, clipped and summed like those of ``per_sample_norm``, and the noise stays as small.
- ``force`` [2]: the same number in a network from which matrices are pruned step by step (here:
  count as zero), K to ``ratio * K`` of them on an exponential schedule. Worth is that of the
  original weights at the pruned network's gradients, so a matrix can come back. Each step reads the
  data: each is a release of its own, all are charged. The paper's Table 15 has FORCE take five
  times as long as SNIP, hence ``saliency.rounds`` of 5.
- ``synflow`` [3]: no data at all, see :mod:`sapf_ray.saliency.synflow`.

A further score, from outside the package::

    SCORES["fisher"] = Score(
        contribution=lambda capture, clip: clip.sum([capture.norms() ** 2]), per_matrix=True
    )
    SCORES["magnitude"] = Score(
        data_free=lambda public: torch.stack([m.weight.norm() for m in public.pool.values()]),
        reads_weights=True,
    )

1. Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR
   2019, eqs. 5-6.
2. de Jorge et al., "Progressive skeletonization: trimming more fat from a network at
   initialization", ICLR 2021, eqs. 7-9.
3. Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
   conserving synaptic flow", NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sapf_ray.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sapf_ray.grad_sample.capture import Pool, PoolCapture
    from sapf_ray.privacy.clipping import Clip
    from sapf_ray.privacy.fixed_point import ExactSum

Sums = Sequence["Tensor"]
"""What is summed over the records: one tensor or several."""


@dataclass(frozen=True, kw_only=True)
class Public:
    """What a data-free score may look at.

    Args:
        denoiser: Frozen, in evaluation mode, not to be changed; without weights (on the meta
            device) unless the score reads them.
        pool: The denoiser's candidate matrices.
        n: Number of matrices to keep in the end.
        rounds: Number of steps of an iterative score.
        seed: Seed of public random numbers.
    """

    denoiser: Any
    pool: Pool
    n: int
    rounds: int
    seed: int


def _shape_of_numbers(pool: Pool) -> list[tuple[int, ...]]:
    return [(len(pool),)]


def _the_sum_itself(sums: Sums) -> Tensor:
    (values,) = sums
    return values


@dataclass(frozen=True, kw_only=True)
class Score:
    """One saliency score: of the data (``contribution``) or without (``data_free``).

    Args:
        contribution: (capture, clip) to the exact sum of this batch's clipped contributions.
        data_free: What is known without the data, to one value per matrix, (K,).
        shapes: Pool to the shapes of the summed tensors; (K,) unless given.
        rank: Noisy sums to one value per matrix, (K,); larger is more salient.
        per_matrix: Whether a record contributes one non-negative number per matrix, which all
            mechanisms can choose from.
        keep_gradients: Whether the contribution needs gradients and not only their norms.
        weighted: Whether norms are those of weight times gradient.
        iterative: Whether it is taken ``saliency.rounds`` times, each time without the matrices
            pruned so far, each time a release.
        reads_weights: Whether ``data_free`` needs the denoiser's weights.
    """

    contribution: Callable[[PoolCapture, Clip], ExactSum] | None = None
    data_free: Callable[[Public], Tensor] | None = None
    shapes: Callable[[Pool], list[tuple[int, ...]]] = _shape_of_numbers
    rank: Callable[[Sums], Tensor] = _the_sum_itself
    per_matrix: bool = False
    keep_gradients: bool = False
    weighted: bool = False
    iterative: bool = False
    reads_weights: bool = False

    def __post_init__(self) -> None:
        if (self.contribution is None) == (self.data_free is None):
            raise ValueError("a score has either a contribution or data_free")


def _numbers(capture: PoolCapture, clip: Clip) -> ExactSum:
    """The vector of a record's K norms, scaled into the ball (docs/design.md, section 5)."""
    return clip.sum([capture.norms()])


def _gradients(capture: PoolCapture, clip: Clip) -> ExactSum:
    """The gradient of the whole pool, clipped jointly (paper eqs. 6-8), record by record.

    Per-sample gradients are made twice, some records and one matrix at a time: for the exact norm
    of what is then summed, and for the sum.
    """
    import torch

    from sapf_ray.privacy.clipping import clipped_units, norms_upward
    from sapf_ray.privacy.fixed_point import ExactSum, grid_step

    weights = [matrix.weight for matrix in capture.pool.values()]
    norms: list[Tensor] = [torch.zeros(0)] * len(weights)
    for number, _, rows in capture.gradients():
        norms[number] = torch.cat([norms[number], norms_upward(rows).cpu()])
    factors = clip.factors(norms_upward(torch.stack(norms, dim=1)))
    units = [torch.zeros(weight.shape, dtype=torch.int64) for weight in weights]
    step = grid_step(clip.bound)
    for number, first, rows in capture.gradients():
        some = factors[first : first + len(rows)].to(rows.device)
        units[number] += clipped_units(rows, some, step).cpu().view_as(units[number])
    return ExactSum(units=units, step=step, sensitivity=clip.bound)


def _norm_of_each(sums: Sums) -> Tensor:
    import torch

    return torch.stack([matrix.norm() for matrix in sums])


def random_values(n: int, seed: int) -> Tensor:
    """(n,) public random values: what is kept where no data are looked at."""
    import torch

    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def _synflow(public: Public) -> Tensor:
    from sapf_ray.saliency.synflow import synflow_scores

    return synflow_scores(public.denoiser, public.pool, n=public.n, rounds=public.rounds)


SCORES: Registry[Score] = Registry(
    "saliency.score",
    {
        "per_sample_norm": Score(contribution=_numbers, per_matrix=True),
        "noisy_mean_gradient": Score(
            contribution=_gradients,
            shapes=lambda pool: [tuple(matrix.weight.shape) for matrix in pool.values()],
            rank=_norm_of_each,
            keep_gradients=True,
        ),
        "snip": Score(contribution=_numbers, per_matrix=True, weighted=True),
        "force": Score(contribution=_numbers, weighted=True, iterative=True),
        "synflow": Score(data_free=_synflow, reads_weights=True),
        "random": Score(data_free=lambda public: random_values(len(public.pool), public.seed)),
    },
)


def n_selected(pool_size: int, ratio: float) -> int:
    """``ceil(ratio * K)``, robust to 0.3 * 10 = 3.0000000000000004; at least 1."""
    return max(1, math.ceil(round(ratio * pool_size, 9)))


def schedule(pool_size: int, kept: int, rounds: int) -> list[int]:
    """Number of matrices kept after each round: from K to ``kept``, exponentially (FORCE, eq. 9).

    Example:
        >>> schedule(96, 29, 5)
        [76, 60, 47, 37, 29]
    """
    steps = [
        math.exp(math.log(pool_size) + t / rounds * math.log(kept / pool_size))
        for t in range(1, rounds + 1)
    ]
    return [math.ceil(round(step, 6)) for step in steps]


def top_n(
    names: list[str], scores: torch.Tensor, *, n: int, granularity: str = "matrix"
) -> list[str]:
    """Names of the best ``n`` matrices, in the pool's order; ties go to the earlier one.

    Args:
        names: K names.
        scores: (K,).
        n: Number of matrices to keep, in [1, K].
        granularity: ``matrix``; or ``layer`` (Layer-Level, paper Figure 4): the matrices' scores
            are summed over each layer (:func:`sapf_ray.models.pool.layer_of`) and whole layers are
            kept, best first, until they hold at least ``n`` matrices. The paper does not say how
            it counts; this is the smallest set of whole layers.
    """
    from sapf_ray.models.pool import layer_of

    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        group = layer_of(name) if granularity == "layer" else name
        groups.setdefault(group, []).append(i)
    values = scores.tolist()
    best_first = sorted(groups.values(), key=lambda group: -sum(values[i] for i in group))
    kept: set[int] = set()
    for members in best_first:  # stable: of equals the earlier comes first
        if len(kept) >= n:
            break
        kept.update(members)
    return [name for i, name in enumerate(names) if i in kept]
