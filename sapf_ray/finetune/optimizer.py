"""DP-SGD's one release per step, on Opacus's distributed optimizer.

Each rank clips and sums its own records' gradients over as many micro-batches as it likes (also
none), rank 0 adds noise of std ``noise_multiplier * clipping_norm`` once, the sum over ranks is
divided by the *expected* batch size, and every rank takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed
from opacus.optimizers import DistributedDPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from sapf_ray.privacy.keyed_rng import NoiseStream
from sapf_ray.privacy.noise import add_gaussian_noise, clip_factors


class ReleaseOptimizer(DistributedDPOptimizer):
    """Opacus's optimizer with automatic clipping, keyed noise and a write-ahead hook.

    Args:
        optimizer: The wrapped optimizer (AdamW).
        noise_multiplier: Noise std over clipping norm; 0 only where ``non_private`` says so.
        clipping: ``automatic`` or ``flat``.
        clipping_norm: C.
        clipping_gamma: gamma of automatic clipping.
        expected_batch_size: B over all ranks.
        before_release: Called on rank 0 with the step's number before its noise exists.
        noise_stream: Step number to the step's noise stream.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clipping: str,
        clipping_norm: float,
        clipping_gamma: float,
        expected_batch_size: int,
        before_release: Callable[[int], object],
        noise_stream: Callable[[int], NoiseStream],
        non_private: bool = False,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.clipping, self.clipping_gamma = clipping, clipping_gamma
        self.batch_size = expected_batch_size
        self.before_release, self.noise_stream = before_release, noise_stream
        self.non_private = non_private
        self.next_step = 0

    def clip(self, norms: Tensor) -> Tensor:
        """(n,) norms of the records' gradients over all parameters to (n,) clip factors."""
        return clip_factors(
            norms, self.max_grad_norm, mode=self.clipping, gamma=self.clipping_gamma
        )

    def accumulate(self, sums: list[Tensor]) -> None:
        """Ends one micro-batch: adds its clipped sums, one per parameter, and takes no step."""
        for p, total in zip(self.params, sums, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad.add_(total)
        self._is_last_step_skipped = True

    def release_step(self) -> None:
        """Ends the logical batch, empty or not: noise once, reduce, divide by B, step."""
        for p in self.params:
            if p.summed_grad is None:  # no record on this rank: it takes the step all the same
                p.summed_grad = torch.zeros_like(p)
        self.add_noise()
        self.reduce_gradients()
        self.scale_grad()
        self.original_optimizer.step()
        self._is_last_step_skipped = False
        self.zero_grad(set_to_none=True)
        self.next_step += 1

    def add_noise(self) -> None:
        for p in self.params:
            p.grad = p.summed_grad
        if self.rank != 0:
            return
        self.before_release(self.next_step)
        noisy = add_gaussian_noise(
            [p.grad for p in self.params],
            self.noise_multiplier,
            self.max_grad_norm,
            self.noise_stream(self.next_step),
            non_private=self.non_private,
        )
        for p, value in zip(self.params, noisy, strict=True):
            p.grad = value

    def reduce_gradients(self) -> None:
        """Sums over ranks, all parameters in one message (Opacus sends one each)."""
        flat = torch.cat([p.grad.flatten() for p in self.params])
        torch.distributed.all_reduce(flat)
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
            p.grad = part.view_as(p)

    def scale_grad(self) -> None:
        for p in self.params:
            p.grad /= self.batch_size
