"""Clipping that keeps its promise in floating point.

Three roundings could let a clipped record pass the bound C: the norm may be computed too small, the
factor times the record may round up, and so may the sum. Each is turned the safe way here, so the
integers that :func:`clipped_units` adds have norm at most C for every record, exactly:

1. :func:`norms_upward`: squares are summed in float64 and the result is multiplied by 1 + 2**-21,
   which is more than float64 can lose over 2**32 entries.
2. :func:`clip_factors`: factors that shrink a record carry a margin of 2**-20.
3. :func:`clipped_units`: products are rounded towards zero onto the grid. With x a record, f its
   factor, u = 2**-24 half a float32 ulp: |fl(fl(f) x_j)| <= f |x_j| (1 + u)**2, hence a norm of at
   most f |x| (1 + 2**-22) <= C (1 - 2**-20) (1 + 2**-22) < C; where f = 1 the product is x itself,
   of norm at most C. Dividing by the step, a power of two, is exact, and rounding towards zero
   makes no entry larger.

References:
    1. Abadi et al. Deep learning with differential privacy. CCS 2016. (flat clipping)
    2. Bu, Wang, Zha, Karypis. Automatic clipping: differentially private deep learning made easier
       and stronger. NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapf_ray.privacy.fixed_point import ExactSum, grid_step

_NORM_MARGIN = 1 + 2.0**-21
_FACTOR_MARGIN = 1 - 2.0**-20
_LARGEST_FACTOR = 1e30
_CHUNK_BYTES = 1 << 18
_MOST_ROWS = 512  # times at most 2**21 steps an entry: below 2**31


def norms_upward(rows: Tensor, order: float = 2.0) -> Tensor:
    """Norm of each row, never below the true one.

    A float32 entry's square is exact in float64. A sum of d non-negative terms, in any order, loses
    at most the factor (1 - 2**-53)**d, at d <= 2**32 more than 1 - 2**-21; so the root loses at
    most 2**-22 (1 + 2**-21), and the last factor of 1 + 2**-21 makes up for that, for the root's
    own rounding and for its own.

    Args:
        rows: (n, ...) float32 or float64.
        order: 2, or infinity, for which no rounding occurs.

    Returns:
        (n,) float64.
    """
    rows = rows.detach().flatten(1)
    if order == float("inf"):
        return rows.abs().amax(1).double() if rows.shape[1] else rows.new_zeros(len(rows)).double()
    if order != 2:
        raise ValueError(f"order = {order!r}: must be 2 or infinity")
    squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    at_once, width = _piece(rows)
    for start in range(0, len(rows), at_once):
        for left in range(0, rows.shape[1], width):
            part = rows[start : start + at_once, left : left + width].double()
            squares[start : start + at_once] += torch.linalg.vecdot(part, part)
    return squares.sqrt_().mul_(_NORM_MARGIN)


def clip_factors(norms: Tensor, clipping_norm: float, *, mode: str, gamma: float = 0.0) -> Tensor:
    """The factor of each record, so that its clipped contribution has norm at most C.

    A record whose norm is infinite or not a number gets the factor 0. That alone does not keep it
    out of a sum, for ``0 * inf`` is not a number: :func:`clipped_units` leaves such records out.

    Args:
        norms: (n,) norm of each record's whole contribution, not below the true one
            (:func:`norms_upward`).
        clipping_norm: C, the sensitivity of the sum; above 0.
        mode: ``automatic``, C / (norm + gamma), or ``flat``, min(1, C / norm).
        gamma: Stability constant of automatic clipping; above 0.

    Returns:
        (n,) float32.

    Raises:
        ValueError: A bound or gamma that is not above 0, or an unknown mode.
    """
    if not clipping_norm > 0:
        raise ValueError(f"clipping_norm = {clipping_norm!r}: must be above 0")
    norms = norms.detach().double()
    if mode == "automatic":
        if not gamma > 0:
            raise ValueError(f"gamma = {gamma!r}: must be above 0")
        factors = clipping_norm / (norms + gamma) * _FACTOR_MARGIN
    elif mode == "flat":
        shrunk = clipping_norm / norms * _FACTOR_MARGIN
        factors = torch.where(norms <= clipping_norm, torch.ones_like(norms), shrunk)
    else:
        raise ValueError(f"mode = {mode!r}: must be automatic or flat")
    factors = torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))
    return factors.clamp(max=_LARGEST_FACTOR).float()


def clipped_units(rows: Tensor, factors: Tensor, step: float) -> Tensor:
    """Sum over the records, each times its factor and rounded towards zero onto the grid.

    The sum is over the records given, never divided by their number; records of factor 0 are left
    out.

    Args:
        rows: (n, ...) each record's contribution, or one tensor of it.
        factors: (n,) from :func:`clip_factors`, of the norm over all of a record's tensors.
        step: The grid's step (:func:`sapf_ray.privacy.fixed_point.grid_step` of C).

    Returns:
        int64 of shape ``rows.shape[1:]``, in grid steps.
    """
    shape = rows.shape[1:]
    rows = rows.detach().flatten(1)
    kept = factors > 0
    if not bool(kept.all()):
        rows = rows[kept]
        factors = factors[kept]
    n, width = rows.shape
    total = torch.zeros(width, dtype=torch.int64, device=rows.device)
    if not (n and width):
        return total.view(shape)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scaled = (factors.to(dtype) / step).unsqueeze(1)  # exact: step is a power of two
    at_once, columns = _piece(rows)
    for left in range(0, width, columns):
        for first in range(0, n, _MOST_ROWS):
            some = torch.zeros(min(columns, width - left), dtype=torch.int32, device=rows.device)
            for start in range(first, min(first + _MOST_ROWS, n), at_once):
                part = rows[start : start + at_once, left : left + columns]
                whole = (part * scaled[start : start + at_once]).to(torch.int32)  # towards zero
                some += whole[0] if at_once == 1 else whole.sum(0, dtype=torch.int32)
            total[left : left + columns] += some
    return total.view(shape)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How a stage clips: the bound, and the way to it.

    Args:
        bound: C, the sensitivity of a sum.
        mode: ``automatic`` or ``flat``, see :func:`clip_factors`.
        gamma: Stability constant of automatic clipping.
        order: Order of the norm that is bounded, 2 or infinity.
    """

    bound: float
    mode: str
    gamma: float = 0.0
    order: float = 2.0

    def factors(self, norms: Tensor) -> Tensor:
        """(n,) norms, none below the true one, to (n,) factors."""
        return clip_factors(norms, self.bound, mode=self.mode, gamma=self.gamma)

    def sum(self, rows: Sequence[Tensor]) -> ExactSum:
        """The exact sum over the records, or groups, of their clipped contributions.

        Args:
            rows: Tensors (n, ...) that together are each one's contribution.
        """
        norms = [norms_upward(part, self.order) for part in rows]
        joint = norms[0] if len(norms) == 1 else norms_upward(torch.stack(norms, 1), self.order)
        factors = self.factors(joint)
        step = grid_step(self.bound)
        units = [clipped_units(part, factors, step).cpu() for part in rows]
        return ExactSum(units=units, step=step, sensitivity=self.bound)


def _piece(rows: Tensor) -> tuple[int, int]:
    """Rows and columns worked on at once: on a CPU what stays in a core's second-level cache."""
    columns = _CHUNK_BYTES // 4
    if rows.device.type == "cpu":
        return max(1, min(_MOST_ROWS, columns // max(1, rows.shape[1]))), columns
    return _MOST_ROWS, columns
