"""Per-sample gradients of LoRA factors and class tokens together: one norm, one clip, one sum.

A record's contribution to a step is one vector: the gradients of all factors, and that of its own
class's tokens, which stand in this class's row while all other rows are zero. So
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

    Attributes:
        per_record: As :class:`LoraGradients`.
    """

    per_record = True

    def __init__(self, factors: LoraGradients, tokens: ClassTokens) -> None:
        self.factors = factors
        self.tokens = tokens

    def grad_sample(self, losses: Tensor) -> Tensor:
        """One backward pass; (n, values of the factors and of one class) float32, a record a row.

        Args:
            losses: (n,) one per record, with its graph; as :meth:`LoraGradients.grad_sample`.
        """
        of_factors = self.factors.grad_sample(losses)
        of_tokens = self.tokens.grad_sample(len(losses)) / self.factors.scale
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
        return [*units, self._by_class(rows[:, width:], scales, grid)]

    def _by_class(self, rows: Tensor, scales: Tensor, grid: float) -> Tensor:
        values = self.tokens.values
        assert self.tokens.labels is not None
        labels = self.tokens.labels[: len(rows)]
        total = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
        for label in labels.unique():
            mine = labels == label
            total[label] = clipped_units(rows[mine], scales[mine], grid).view(values.shape[1:])
        return total
