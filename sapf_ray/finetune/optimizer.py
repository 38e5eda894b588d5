"""DP-SGD's one release per step, on Opacus's distributed optimizer.

Each rank clips and sums its own records' gradients over as many micro-batches as it likes (also none),
rank 0 adds noise of std ``noise_multiplier * clipping_norm`` once, the sum over ranks is divided by the
*expected* batch size, and every rank takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.optimizers import DistributedDPOptimizer
from torch.optim import Optimizer

from sapf_ray.privacy.noise import add_gaussian_noise, clip_factors, clipped_sum
from sapf_ray.privacy.streams import NoiseStream


class ReleaseOptimizer(DistributedDPOptimizer):
    """Opacus's optimizer with automatic clipping, keyed noise and a write-ahead hook.

    Args:
        optimizer: The wrapped optimizer (AdamW).
        noise_multiplier: Noise std over clipping norm; 0 only where ``non_private`` says so.
        clipping: ``automatic`` or ``flat``.
        clipping_norm: C.
        clipping_gamma: gamma of automatic clipping.
        expected_batch_size: B over all ranks.
        draws_per_record: Rows of ``grad_sample`` that belong to one record.
        before_release: Called on rank 0 with the step's number before its noise exists.
        noise_stream: Step number to the step's noise stream.
    """

    def __init__(
        self, optimizer: Optimizer, *, noise_multiplier: float, clipping: str, clipping_norm: float,
        clipping_gamma: float, expected_batch_size: int, draws_per_record: int,
        before_release: Callable[[int], object], noise_stream: Callable[[int], NoiseStream],
        non_private: bool = False,
    ) -> None:
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clipping_norm,
            expected_batch_size=None, loss_reduction="sum",
        )
        self.clipping, self.clipping_gamma = clipping, clipping_gamma
        self.batch_size, self.draws_per_record = expected_batch_size, draws_per_record
        self.before_release, self.noise_stream = before_release, noise_stream
        self.non_private = non_private
        self.next_step = 0

    def clip_and_accumulate(self) -> None:
        """Adds this micro-batch's clipped per-record gradients to ``summed_grad``."""
        per_record = []
        for p in self.params:
            rows = self._get_flat_grad_sample(p).to(p.dtype)
            per_record.append(rows.view(-1, self.draws_per_record, p.numel()).sum(1))  # loss is a mean over draws
        norms = torch.stack([g.norm(dim=1) for g in per_record], dim=1).norm(dim=1)
        factors = clip_factors(norms, self.max_grad_norm, self.clipping, self.clipping_gamma)
        for p, g in zip(self.params, per_record, strict=True):
            clipped = clipped_sum(g, factors).view_as(p)
            p.summed_grad = clipped if p.summed_grad is None else p.summed_grad + clipped
            p.grad_sample = None

    def accumulate(self) -> None:
        """Ends one micro-batch: clip, add up, take no step."""
        self.clip_and_accumulate()
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
            [p.grad for p in self.params], self.noise_multiplier, self.max_grad_norm,
            self.noise_stream(self.next_step), non_private=self.non_private,
        )
        for p, value in zip(self.params, noisy, strict=True):
            p.grad = value

    def scale_grad(self) -> None:
        for p in self.params:
            p.grad /= self.batch_size
