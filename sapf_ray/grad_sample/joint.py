"""Per-sample gradients of LoRA factors and class tokens together: one norm, one clip, one sum.

A record's contribution to a step is one vector: the gradients of all factors, and that of its own
class's tokens, which stand in this class's row while all other rows are zero (a group's images may
be of several classes, and have the mean of such vectors). So
its norm is that of the factors' gradients and of the record's own condition rows together, and the
sum over records has the sensitivity that the clip promises, whatever the number of classes. Clipped
apart, both parts of norm C, the sum would move by up to sqrt(2) C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.grad_sample.norms import squared_norms
from sapf_ray.models.class_tokens import ClassTokens
from sapf_ray.privacy.clipping import clipped_units


class JointGradients:
    """Clipped sums of per-sample gradients of LoRA factors, then of class tokens.

    Args:
        factors: The factors' gradients.
        tokens: Part of the same model; :meth:`ClassTokens.shift` made each batch's conditions.
        rows_per_unit: Conditions of one record or group, side by side in the batch: the draws of a
            group, for its images have classes of their own.

    Attributes:
        per_record: As :class:`LoraGradients`.
    """

    per_record = True

    def __init__(
        self, factors: LoraGradients, tokens: ClassTokens, *, rows_per_unit: int = 1
    ) -> None:
        self.factors = factors
        self.tokens = tokens
        self.rows_per_unit = rows_per_unit

    def grad_sample(self, losses: Tensor) -> Tensor:
        """One backward pass; (n, values of the factors and of one class) float32, a record a row.

        Where a unit has several conditions, the values of all classes stand there.

        Args:
            losses: (n,) one per record, with its graph; as :meth:`LoraGradients.grad_sample`.
        """
        of_factors = self.factors.grad_sample(losses)
        n = len(losses)
        of_tokens = self.tokens.grad_sample(n * self.rows_per_unit) / self.factors.scale
        if self.rows_per_unit > 1:
            of_tokens = self._all_classes(of_tokens, n)
        return torch.cat([of_factors, of_tokens], dim=1)

    def grid_step(self, clipping_norm: float) -> float:
        """Width of the grid on which gradients of records are added."""
        return self.factors.grid_step(clipping_norm)

    def probe(self, losses: Tensor) -> bytes:
        """The bits of the first record's gradient."""
        return self.grad_sample(losses)[0].cpu().numpy().tobytes()

    def clipped_units(
        self, losses: Tensor, clip: Callable[[Tensor], Tensor], *, grid: float
    ) -> list[Tensor]:
        """The exact sum over records; a record's class tokens are added to its own class's row.

        Args:
            losses: As :meth:`LoraGradients.clipped_units`, like the rest.
            clip: Norms of the records' whole gradients, factors and tokens, to factors.
            grid: The grid's step.

        Returns:
            One int64 sum per LoRA factor, and one of the shape of all tokens.
        """
        rows = self.grad_sample(losses)
        scales = clip(squared_norms(rows).sqrt())
        parts = self.factors.parameters
        width = sum(p.numel() for p in parts)
        total = clipped_units(rows[:, :width], scales, grid)
        units = [
            part.view_as(p)
            for part, p in zip(total.split([p.numel() for p in parts]), parts, strict=True)
        ]
        if self.rows_per_unit > 1:
            of_tokens = clipped_units(rows[:, width:], scales, grid)
            return [*units, of_tokens.view(self.tokens.values.shape)]
        return [*units, self._by_class(rows[:, width:], scales, grid)]

    def _all_classes(self, of_tokens: Tensor, n: int) -> Tensor:
        """(n, values of all classes): each unit's sum over its conditions, class by class."""
        labels = self.tokens.labels
        assert labels is not None
        shape = self.tokens.values.shape
        k = self.rows_per_unit
        units = torch.arange(n, device=of_tokens.device).repeat_interleave(k)
        dense = torch.zeros(n, shape[0], of_tokens.shape[1], device=of_tokens.device)
        # one condition of each unit at a time: repeats would be added in no fixed order
        for draw in range(k):
            dense[units[draw::k], labels[draw : n * k : k]] += of_tokens[draw::k]
        return dense.flatten(1)

    def _by_class(self, rows: Tensor, scales: Tensor, grid: float) -> Tensor:
        values = self.tokens.values
        assert self.tokens.labels is not None
        labels = self.tokens.labels[: len(rows)]
        total = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
        for label in labels.unique():
            mine = labels == label
            total[label] = clipped_units(rows[mine], scales[mine], grid).view(values.shape[1:])
        return total
