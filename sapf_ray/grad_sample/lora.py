"""Per-sample gradients of LoRA factors at the price of an ordinary backward pass.

A LoRA layer computes ``y = x (W + s B A)^T`` with W frozen. Its factors are thin, so a record's
gradients

    dA = s (g B)^T x   (r, d_in)          dB = s g^T (x A^T)   (d_out, r)

cost about r / d of the products that back-propagation makes anyway. A convolution is the same on
the unfolded patches of its input, with A of the base layer's kernel size and B of size 1.
:class:`LoraGradients` replaces peft's forward (four products, five saved tensors) by one autograd
node that multiplies with the merged matrix and leaves both per-sample gradients behind as it
passes. Nothing else is kept: frozen weights have no gradient, and autograd stops below the first
adapter by itself, for nothing there requires one.

Opacus's hooks, for comparison, save every activation a second time, compute the summed gradient of
each factor besides the per-sample one, and wrap every module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from sapf_ray.grad_sample.norms import channel_tokens, fold_tokens, patches
from sapf_ray.privacy.noise import clipped_sum


def conv_limits(layer: nn.Module) -> str:
    """What keeps LoRA on this convolution from having per-sample gradients here; empty where
    nothing does.
    """
    plain = not isinstance(layer, nn.Conv2d) or (
        layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.dilation == (1, 1)
        and not isinstance(layer.padding, str)
    )
    return (
        ""
        if plain
        else "a convolution with groups, dilation or padding other than a number of zeros"
    )


class _Layer:
    """One adapted linear layer: its parameters, and the per-sample gradients the last backward pass
    left.
    """

    def __init__(self, module: PeftLinear | PeftConv2d, rows_per_record: int) -> None:
        (name,) = module.active_adapters
        if module.lora_variant or not isinstance(module.lora_dropout[name], nn.Identity):
            raise ValueError(
                f"{type(module).__name__}: only plain LoRA without dropout has these gradients"
            )
        self.base: Any = module.get_base_layer()
        if conv_limits(self.base):
            raise ValueError(f"{type(module).__name__}: {conv_limits(self.base)}")
        self.a: nn.Parameter = module.lora_A[name].weight
        self.b: nn.Parameter = module.lora_B[name].weight
        self.scale = float(module.scaling[name])
        self.rows_per_record = rows_per_record
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return _LoraFunction.apply(x, self.a, self.b, self)

    def merged(self, dtype: torch.dtype) -> Tensor | None:
        """W + s B A, or None in a precision whose rounding of W would swallow a small update."""
        weight = self.base.weight
        if weight.dtype != torch.float32 or dtype != torch.float32:
            return None
        update = torch.addmm(
            weight.flatten(1), self.b.flatten(1), self.a.flatten(1), alpha=self.scale
        )
        return update.view(weight.shape)

    def give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Adds the gradient of one use of the layer in the forward pass."""
        known = self.gradients.get(parameter)
        self.gradients[parameter] = gradient if known is None else known + gradient

    def take(self, parameter: nn.Parameter) -> Tensor:
        """(n, *shape) per-sample gradient, float32; forgotten here."""
        return self.gradients.pop(parameter)

    def apply(self, x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """The layer's map with another weight."""
        return F.linear(x, weight, bias)

    def widen(self, x: Tensor) -> Tensor:
        """B on r features per position."""
        return F.linear(x, self.b.to(x.dtype))

    def narrow(self, g: Tensor) -> Tensor:
        """B transposed: output gradient to the gradient of the r features."""
        return g @ self.b.to(g.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """(n, T, d_in): a record's rows are tokens of one longer sequence."""
        return fold_tokens(x, self.rows_per_record)

    def outputs(self, g: Tensor) -> Tensor:
        """(n, T, features) of an output or its gradient."""
        return fold_tokens(g, self.rows_per_record)

    def input_gradient(self, x: Tensor, g: Tensor, *, weight: Tensor) -> Tensor:
        """Gradient with respect to x of :meth:`apply`."""
        return g @ weight


class _ConvLayer(_Layer):
    """One adapted convolution."""

    def apply(self, x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.base.stride, self.base.padding)

    def widen(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.b.to(x.dtype))

    def narrow(self, g: Tensor) -> Tensor:
        return F.conv2d(g, self.b.to(g.dtype).transpose(0, 1))

    def inputs(self, x: Tensor) -> Tensor:
        return patches(self.base, x, block=slice(None), k=self.rows_per_record)

    def outputs(self, g: Tensor) -> Tensor:
        return channel_tokens(g.float().flatten(2), 1, k=self.rows_per_record)

    def input_gradient(self, x: Tensor, g: Tensor, *, weight: Tensor) -> Tensor:
        return conv2d_input(x.shape, weight, g, self.base.stride, self.base.padding)


class _LoraFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: _Layer) -> Tensor:
        weight = layer.merged(x.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, a, *(() if weight is None else (weight,)))
        if weight is not None:
            return layer.apply(x, weight, bias=layer.base.bias)
        return layer.base(x) + layer.scale * layer.widen(layer.apply(x, a.to(x.dtype)))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (g,) = upstream
        layer: _Layer = ctx.layer
        x, a, *merged = ctx.saved_tensors
        inputs, thin = layer.inputs(x), layer.narrow(g)
        if layer.a.requires_grad:
            layer.give(layer.a, layer.scale * torch.bmm(layer.outputs(thin).mT, inputs).float())
        features = inputs @ a.flatten(1).to(inputs.dtype).mT
        layer.give(layer.b, layer.scale * torch.bmm(layer.outputs(g).mT, features).float())
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if merged:
            return layer.input_gradient(x, g, weight=merged[0]), None, None, None
        through_a = layer.input_gradient(x, thin, weight=a.to(g.dtype))
        return (
            layer.input_gradient(x, g, weight=layer.base.weight) + layer.scale * through_a,
            None,
            None,
            None,
        )


class LoraGradients:
    """Clipped sums of per-sample gradients of a model's LoRA factors.

    Installs itself in the peft layers of ``denoiser``; :meth:`remove` gives them their own forward
    back.

    Args:
        denoiser: A model with one LoRA adapter (:func:`sapf_ray.finetune.adapter.add_lora`).
        parameters: The trainable factors; sums come in this order.
        rows_per_record: Rows of the batch that belong to one record, record after record.
    """

    def __init__(
        self, denoiser: nn.Module, parameters: Iterable[nn.Parameter], *, rows_per_record: int = 1
    ) -> None:
        self.parameters = list(parameters)
        self._modules = [m for m in denoiser.modules() if isinstance(m, PeftLinear | PeftConv2d)]
        self._layers = [
            (_ConvLayer if isinstance(module, PeftConv2d) else _Layer)(module, rows_per_record)
            for module in self._modules
        ]
        self._owner = {p: layer for layer in self._layers for p in (layer.a, layer.b)}
        foreign = [p for p in self.parameters if p not in self._owner]
        if foreign:
            raise ValueError(f"{len(foreign)} parameters are not LoRA factors of this model")
        for module, layer in zip(self._modules, self._layers, strict=True):
            module.forward = layer.forward  # type: ignore[method-assign]

    def remove(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def clipped_sums(self, losses: Tensor, clip: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """One backward pass, then ``sum_i factor_i * gradient_i`` of each parameter.

        Args:
            losses: (n,) one per record, with its graph.
            clip: (n,) norms of the records' whole gradients to (n,) factors.

        Returns:
            One float32 sum per parameter, of its shape.
        """
        for layer in self._layers:
            # of a backward pass that was broken off: they belong to other records
            layer.gradients.clear()
        losses.sum().backward()
        rows = torch.cat([self._owner[p].take(p).flatten(1) for p in self.parameters], dim=1)
        total = clipped_sum(rows, clip(torch.linalg.vector_norm(rows, dim=1)))
        parts = total.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
