"""Taps on the outputs of layers, and walks over the autograd graph: the tools of ghost clipping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from sapf_ray.grad_sample.norms import Call


class Receive(Protocol):
    """What a tap does on the way back."""

    def __call__(self, layer: int, call: Call) -> None:
        """Takes one call of the layer at that position."""


class Tap(torch.autograd.Function):
    """Identity on a layer's output; shows the layer's call to ``receive`` on the way back."""

    @staticmethod
    def forward(  # noqa: PLR0917  # positions are torch.apply's
        ctx: Any,
        output: Tensor,
        activations: Tensor,
        probe: Tensor,
        layer: int,
        receive: Receive,
    ) -> Tensor:
        # watched by autograd: a change in place raises; recomputed under checkpointing
        ctx.save_for_backward(activations)
        ctx.layer = layer
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (activations,) = ctx.saved_tensors
        (backprops,) = gradients
        ctx.receive(ctx.layer, Call(activations, backprops.detach()))
        return backprops, None, None, None, None


def weighted(
    call: Call,
    rows: slice,
    *,
    weights: Tensor,
) -> Call:
    """Those rows in float32, backprops times their weights; rows of weight 0 are blanked."""
    activations = call.activations[rows]
    if activations.is_floating_point():
        left_out = per_row(weights == 0, like=activations)
        activations = activations.float().masked_fill(left_out, 0.0)
    backprops = call.backprops[rows].float() * per_row(weights, like=call.backprops)
    backprops.masked_fill_(per_row(weights == 0, like=backprops), 0.0)
    return Call(activations, backprops)


def per_row(values: Tensor, *, like: Tensor) -> Tensor:
    """(B,) values in a shape that broadcasts over the rows of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def graph_nodes(losses: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph above ``losses``, leaves aside."""
    seen = {losses.grad_fn}
    stack = [losses.grad_fn]
    while stack:
        node = stack.pop()
        assert node is not None
        yield node
        for parent, _ in node.next_functions:
            if parent is None or parent in seen or hasattr(parent, "variable"):
                continue
            seen.add(parent)
            stack.append(parent)
