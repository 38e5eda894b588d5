"""Sums that are exact: integers on a fixed-point grid.

Floating-point addition is not associative. When one record is taken away, every later record is
added to another partial sum and rounds differently, so the sums of neighbouring data sets differ by
more than that record: at 302,436 records in float32 by up to 5.68 times the clipping norm
(Casacuberta et al. 2022 show the effect in DP libraries). Here every clipped contribution is
rounded *towards zero* onto a grid, so its norm cannot grow, and the grid's integers are added.
Integer addition is associative: the sum depends on the records alone, not on their order, on
shards, micro-batches or the number of workers, and neighbours differ by one record's contribution
to the last bit.

Example::

    step = grid_step(clipping_norm)
    total = ExactSum.zeros([(4, 3)], clipping_norm)
    for rows in batches:                                   # rows: (n, 4, 3)
        factors = clip_factors(norms(rows), clipping_norm, mode="flat")
        total += ExactSum.of([clipped_units(rows, factors, step)], clipping_norm)
    noisy = releaser.gaussian("finetune/step/17", total, stage="finetune")

References:
    1. Casacuberta, Shoemate, Vadhan, Wagaman. Widespread underestimation of sensitivity in
       differentially private libraries and how to fix it. CCS 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRID_BITS = 20
ONE_VOTE = 2**GRID_BITS
"""What one vote is on the grid of sums of sensitivity 1."""

MAX_UNITS = 2**52
"""Largest magnitude of a sum in grid steps: float64 holds it exactly, with noise on top."""


def grid_step(bound: float) -> float:
    """The grid's step for contributions of norm at most ``bound``: a power of two.

    It lies in (bound * 2**-21, bound * 2**-20], so a contribution's entries are at most 2**21
    steps, and rounding towards zero costs a vector of d entries at most ``sqrt(d) * step`` of its
    norm: 0.05 % of the bound at d = 250,000.

    Example:
        >>> grid_step(1.0) == 2.0**-20
        True
    """
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"bound = {bound!r}: must be above 0 and finite")
    _, exponent = math.frexp(bound)  # bound = m * 2**exponent with m in [0.5, 1)
    return math.ldexp(1.0, exponent - 1 - GRID_BITS)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactSum:
    """A sum of clipped contributions, exact on its grid. Sensitive: it has no noise.

    Args:
        units: int64 tensors, the sum in grid steps.
        step: Width of the grid, a power of two.
        sensitivity: Largest norm of one record's contribution. It travels with the sum, so that
            noise is scaled to what was summed.
    """

    units: Sequence[Tensor]
    step: float
    sensitivity: float

    def __post_init__(self) -> None:
        if any(part.dtype != torch.int64 for part in self.units):
            raise ValueError("an exact sum holds int64 tensors")
        if not self.sensitivity > 0:
            raise ValueError(f"sensitivity = {self.sensitivity!r}: must be above 0")
        if math.frexp(self.step)[0] != 0.5:
            raise ValueError(f"step = {self.step!r}: must be a power of two")

    @classmethod
    def of(cls, units: Iterable[Tensor], sensitivity: float) -> ExactSum:
        """The sum ``units`` on the grid that belongs to ``sensitivity``."""
        return cls(units=list(units), step=grid_step(sensitivity), sensitivity=sensitivity)

    @classmethod
    def zeros(cls, shapes: Iterable[Sequence[int]], sensitivity: float) -> ExactSum:
        """The sum over no record."""
        return cls.of([torch.zeros(tuple(s), dtype=torch.int64) for s in shapes], sensitivity)

    @classmethod
    def rounded(cls, values: Iterable[Tensor], sensitivity: float) -> ExactSum:
        """Floating-point sums, rounded towards zero onto the grid.

        Only for sums whose floating-point error is bounded elsewhere (``StagePlan.slack``), or
        whose values are on the grid already.

        Raises:
            ValueError: A value is not finite: noise would not hide that.
        """
        step = grid_step(sensitivity)
        units = []
        for part in values:
            if not bool(torch.isfinite(part).all()):
                raise ValueError("the sum is not finite: noise would not hide that")
            units.append((part.detach().double() / step).trunc_().to("cpu", torch.int64))
        return cls(units=units, step=step, sensitivity=sensitivity)

    def __add__(self, other: ExactSum) -> ExactSum:
        """The sum over both sets of records.

        Raises:
            ValueError: The sums lie on different grids or have different sensitivities or shapes.
        """
        if (self.step, self.sensitivity) != (other.step, other.sensitivity):
            raise ValueError("sums of different grids or sensitivities cannot be added")
        if self.shapes != other.shapes:
            raise ValueError("sums of different shapes cannot be added")
        units = [a + b for a, b in zip(self.units, other.units, strict=True)]
        return ExactSum(units=units, step=self.step, sensitivity=self.sensitivity)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each tensor."""
        return [tuple(part.shape) for part in self.units]

    def digest(self) -> str:
        """SHA-256 over grid, sensitivity, shapes and units.

        It says whether two sums are equal, so it is as sensitive as the sum: it leaves the process
        only through the secret key.
        """
        content = hashlib.sha256()
        content.update(repr((self.step, self.sensitivity, self.shapes)).encode())
        for part in self.units:
            content.update(part.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return content.hexdigest()

    def check_range(self) -> None:
        """Raises OverflowError where a sum left the range in which float64 is exact."""
        for part in self.units:
            if part.numel() and int(part.abs().max()) > MAX_UNITS:
                raise OverflowError("a sum left the range of its fixed-point grid")

    def values(self) -> list[Tensor]:
        """The sums themselves, float64, exact."""
        self.check_range()
        return [part.cpu().double() * self.step for part in self.units]
