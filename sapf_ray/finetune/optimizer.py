"""DP-SGD's one release per step.

Each rank adds its own records' clipped gradients, as integers on a grid, over as many micro-batches
as it likes (also none): :meth:`ReleaseOptimizer.accumulate`. Then all ranks together take one step
(:meth:`ReleaseOptimizer.release_step`): the sums of all ranks are added on rank 0, whose releaser
pays and draws the noise once, and the noisy sum, divided by the *expected* batch size, is every
rank's gradient.

Opacus's ``DistributedDPOptimizer`` was the base of this class. Its float sums per parameter cannot
hold exact ones, and its clipping, noise, reduction, scaling and step were all replaced, so there
was nothing left to inherit; it remains the reference in tests and benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sapf_ray.config import FinetuneConfig
from sapf_ray.privacy.clipping import clip_factors
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.release import Releaser
from sapf_ray.stages import Stage


def release_name(step: int) -> str:
    """What the ledger calls a step."""
    return f"finetune/step/{step}"


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """How a record's gradient is scaled into the ball of radius ``norm``.

    Attributes:
        norm: C, above 0: the sensitivity of the sum.
        mode: ``automatic`` or ``flat``.
        gamma: Stability constant of automatic clipping.
    """

    norm: float
    mode: str
    gamma: float = 0.0

    @classmethod
    def of(cls, config: FinetuneConfig) -> Clipping:
        """Fine-tuning's clipping."""
        return cls(norm=config.clipping_norm, mode=config.clipping, gamma=config.clipping_gamma)

    def __call__(self, norms: Tensor) -> Tensor:
        """(n,) norms of the records' gradients over all parameters to (n,) clip factors."""
        return clip_factors(norms, self.norm, mode=self.mode, gamma=self.gamma)


class ReleaseOptimizer:
    """A torch optimizer that steps on noisy sums alone.

    Args:
        optimizer: Takes the step (AdamW).
        clipping: Bounds each record; its norm is the sensitivity.
        grid: Width of the grid on which clipped gradients are added, a power of two.
        expected_batch_size: B over all ranks, the divisor.
        releaser: Used on rank 0 alone.

    Attributes:
        next_step: Number of the step that :meth:`release_step` takes next.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clipping: Clipping,
        grid: float,
        expected_batch_size: int,
        releaser: Releaser,
    ) -> None:
        self.optimizer = optimizer
        self.clipping = clipping
        self.grid = grid
        self.batch_size = expected_batch_size
        self.releaser = releaser
        self.next_step = 0
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        sizes = [p.numel() for p in self.params]
        # one buffer, so that ranks exchange one message
        self._sum = torch.zeros(sum(sizes), dtype=torch.int64, device=self.params[0].device)
        self._parts = list(self._sum.split(sizes))

    def accumulate(self, units: list[Tensor]) -> None:
        """Ends one micro-batch: adds its clipped sums, and takes no step.

        Args:
            units: int64, one per parameter in its shape, in steps of the grid.
        """
        for part, addend in zip(self._parts, units, strict=True):
            part += addend.flatten()

    def release_step(self) -> None:
        """Ends the logical batch, empty or not: reduce, noise once, divide by B, step.

        Raises:
            BudgetError: On rank 0, before the step that would pass the planned epsilon.
        """
        noisy = self._noisy_sum()
        gradient = noisy.div_(self.batch_size)
        parts = gradient.split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts, strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sum.zero_()
        self.next_step += 1

    def _noisy_sum(self) -> Tensor:
        """The release, flat in float32, the same on every rank."""
        dist.reduce(self._sum, dst=0)
        noisy = torch.empty(len(self._sum), device=self._sum.device)
        if dist.get_rank() == 0:
            total = ExactSum(
                units=[self._sum.cpu()], step=self.grid, sensitivity=self.clipping.norm
            )
            (released,) = self.release(total)
            noisy.copy_(released)
        dist.broadcast(noisy, src=0)
        return noisy

    def release(self, total: ExactSum) -> list[Tensor]:
        """Pays for the step and adds its noise; on rank 0."""
        return self.releaser.gaussian(release_name(self.next_step), total, stage=Stage.FINETUNE)
