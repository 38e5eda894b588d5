"""Tiny U-Net and DiT with random batches, and the oracle: gradients by one forward and backward per
record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from tests.tiny import tiny_unet


def tiny_dit(attention_bias: bool = True) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        attention_bias=attention_bias,
        num_embeds_ada_norm=3,
        norm_num_groups=4,
    )


@dataclass(frozen=True)
class Case:
    """A model, a batch (first axis: n·k rows, record-major) and the loss of each row."""

    model: nn.Module
    batch: Sequence[Tensor]
    row_losses: Callable[..., Tensor]
    rows_per_record: int = 1

    def losses(self, records: slice = slice(None)) -> Tensor:
        """(n,) mean over each record's rows."""
        k = self.rows_per_record
        rows = slice(
            None if records.start is None else records.start * k,
            None if records.stop is None else records.stop * k,
        )
        return (
            self.row_losses(self.model, *(part[rows] for part in self.batch))
            .unflatten(0, (-1, k))
            .mean(1)
        )

    def gradients(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """The oracle: records x parameters."""
        flags = [p.requires_grad for p in parameters]
        for p in parameters:
            p.requires_grad_(True)
        n = len(self.batch[0]) // self.rows_per_record
        rows = [
            list(
                torch.autograd.grad(
                    self.losses(slice(i, i + 1)).sum(),
                    parameters,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for i in range(n)
        ]
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
        return rows


def _unet_losses(unet: nn.Module, x: Tensor, t: Tensor, states: Tensor, target: Tensor) -> Tensor:
    predicted = unet(x, t, encoder_hidden_states=states).sample
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def _dit_losses(dit: nn.Module, x: Tensor, t: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    predicted = dit(x, timestep=t, class_labels=labels).sample
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def unet_case(n: int, k: int = 1, unet: nn.Module | None = None) -> Case:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, n * k, 4, 4, 4, generator=generator)
    states = torch.randn(n * k, 7, 16, generator=generator)
    t = torch.randint(0, 1000, (n * k,), generator=generator)
    return Case(
        model=unet or tiny_unet().eval(),
        batch=(x, t, states, target),
        row_losses=_unet_losses,
        rows_per_record=k,
    )


def dit_case(n: int, k: int = 1, dit: nn.Module | None = None) -> Case:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, n * k, 4, 4, 4, generator=generator)
    t = torch.randint(0, 1000, (n * k,), generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator).repeat_interleave(k)
    return Case(
        model=dit or tiny_dit().eval(),
        batch=(x, t, labels, target),
        row_losses=_dit_losses,
        rows_per_record=k,
    )


CASES = {"unet": unet_case, "dit": dit_case}
