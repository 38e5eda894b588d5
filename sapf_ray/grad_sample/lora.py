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

from sapf_ray.grad_sample.layers import channel_tokens, patches
from sapf_ray.grad_sample.norms import fold_tokens, squared_norms
from sapf_ray.privacy.clipping import clipped_units
from sapf_ray.privacy.fixed_point import grid_step


def conv_limits(layer: nn.Module) -> str:
    """Why LoRA on this convolution has no per-sample gradients here; empty where it has."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    padding_is_plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if padding_is_plain and layer.groups == 1 and layer.dilation == (1, 1):
        return ""
    return "a convolution with groups, dilation or padding other than a number of zeros"


class _LoraLinear:
    """One adapted linear layer, and the per-sample gradients the last backward pass left."""

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
        self.grad_sample: dict[nn.Parameter, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return _LoraFunction.apply(
            x,
            self.a,
            self.b,
            self,
        )

    def merged_weight(self, dtype: torch.dtype) -> Tensor | None:
        """W + s B A, or None in a precision whose rounding of W would swallow a small update."""
        weight = self.base.weight
        if weight.dtype != torch.float32 or dtype != torch.float32:
            return None
        update = torch.addmm(
            weight.flatten(1),
            self.b.flatten(1),
            self.a.flatten(1),
            alpha=self.scale,
        )
        return update.view(weight.shape)

    def add_grad_sample(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Adds the (n, *shape) gradient of one call of the layer in the forward pass."""
        known = self.grad_sample.get(parameter)
        self.grad_sample[parameter] = gradient if known is None else known + gradient

    def pop_grad_sample(self, parameter: nn.Parameter) -> Tensor:
        """(n, *shape) per-sample gradient, float32; forgotten here."""
        return self.grad_sample.pop(parameter)

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The layer's map with another weight."""
        return F.linear(x, weight, bias)

    def times_b(self, features: Tensor) -> Tensor:
        """B on the r features of each position."""
        return F.linear(features, self.b.to(features.dtype))

    def times_b_transposed(self, backprops: Tensor) -> Tensor:
        """The gradient of the r features of each position."""
        return backprops @ self.b.to(backprops.dtype)

    def activation_tokens(self, x: Tensor) -> Tensor:
        """(n, T, d_in): a record's rows are tokens of one longer sequence."""
        return fold_tokens(x, self.rows_per_record)

    def backprop_tokens(self, backprops: Tensor) -> Tensor:
        """(n, T, features)."""
        return fold_tokens(backprops, self.rows_per_record)

    def input_gradient(
        self,
        x: Tensor,
        backprops: Tensor,
        *,
        weight: Tensor,
    ) -> Tensor:
        """Gradient with respect to x of :meth:`apply`."""
        return backprops @ weight


class _LoraConv2d(_LoraLinear):
    """One adapted convolution."""

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        return F.conv2d(
            x,
            weight,
            bias,
            self.base.stride,
            self.base.padding,
        )

    def times_b(self, features: Tensor) -> Tensor:
        return F.conv2d(features, self.b.to(features.dtype))

    def times_b_transposed(self, backprops: Tensor) -> Tensor:
        return F.conv2d(backprops, self.b.to(backprops.dtype).transpose(0, 1))

    def activation_tokens(self, x: Tensor) -> Tensor:
        return patches(
            self.base,
            x,
            channels=slice(None),
            rows_per_record=self.rows_per_record,
        )

    def backprop_tokens(self, backprops: Tensor) -> Tensor:
        positions = backprops.float().flatten(2)
        return channel_tokens(positions, 1, rows_per_record=self.rows_per_record)

    def input_gradient(
        self,
        x: Tensor,
        backprops: Tensor,
        *,
        weight: Tensor,
    ) -> Tensor:
        return conv2d_input(
            x.shape,
            weight,
            backprops,
            self.base.stride,
            self.base.padding,
        )


class _LoraFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  # positions are torch.apply's
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        layer: _LoraLinear,
    ) -> Tensor:
        ctx.layer = layer
        weight = layer.merged_weight(x.dtype)
        if weight is not None:
            ctx.save_for_backward(x, a, weight)
            return layer.apply(x, weight, bias=layer.base.bias)
        ctx.save_for_backward(x, a)
        features = layer.apply(x, a.to(x.dtype))
        return layer.base(x) + layer.scale * layer.times_b(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (backprops,) = gradients
        layer: _LoraLinear = ctx.layer
        x, a, *merged = ctx.saved_tensors
        activations = layer.activation_tokens(x)
        thin = layer.times_b_transposed(backprops)
        if layer.a.requires_grad:
            of_a = torch.bmm(layer.backprop_tokens(thin).mT, activations)
            layer.add_grad_sample(layer.a, layer.scale * of_a.float())
        features = activations @ a.flatten(1).to(activations.dtype).mT
        of_b = torch.bmm(layer.backprop_tokens(backprops).mT, features)
        layer.add_grad_sample(layer.b, layer.scale * of_b.float())
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if merged:
            return layer.input_gradient(x, backprops, weight=merged[0]), None, None, None
        gradient = layer.input_gradient(x, backprops, weight=layer.base.weight)
        through_a = layer.input_gradient(x, thin, weight=a.to(backprops.dtype))
        return gradient + layer.scale * through_a, None, None, None


class LoraGradients:
    """Clipped sums of per-sample gradients of a model's LoRA factors.

    Installs itself in the peft layers of ``denoiser``; :meth:`remove` gives them their own forward
    back.

    Args:
        denoiser: A model with one LoRA adapter (:func:`sapf_ray.finetune.adapter.add_lora`).
        parameters: The trainable factors; sums come in this order.
        rows_per_record: K rows of the batch belong to one record, record after record.

    Attributes:
        per_record: Whether a record's gradient stands alone: what is summed does not depend on how
            records are spread over micro-batches.
    """

    per_record = True

    def __init__(
        self,
        denoiser: nn.Module,
        parameters: Iterable[nn.Parameter],
        *,
        rows_per_record: int = 1,
        scale: float = 1.0,
    ) -> None:
        self.parameters = list(parameters)
        self.scale = scale
        self._modules = [m for m in denoiser.modules() if isinstance(m, PeftLinear | PeftConv2d)]
        self._layers = [_adapted(module, rows_per_record) for module in self._modules]
        self._owner = {p: layer for layer in self._layers for p in (layer.a, layer.b)}
        foreign = [p for p in self.parameters if p not in self._owner]
        if foreign:
            raise ValueError(f"{len(foreign)} parameters are not LoRA factors of this model")
        for module, layer in zip(self._modules, self._layers, strict=True):
            module.forward = layer.forward  # type: ignore[method-assign]

    def remove(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def grad_sample(self, losses: Tensor) -> Tensor:
        """One backward pass; (n, number of trained values) float32 gradients, a record a row.

        Args:
            losses: (n,) one per record, with its graph. The batch may have further records, whose
                gradients are dropped.
        """
        for layer in self._layers:
            # of a backward pass that was broken off: they belong to other records
            layer.grad_sample.clear()
        (losses.sum() * self.scale).backward()
        gradients = [self._owner[p].pop_grad_sample(p) for p in self.parameters]
        rows = torch.cat([gradient[: len(losses)].flatten(1) for gradient in gradients], dim=1)
        return rows.div_(self.scale)

    def grid_step(self, clipping_norm: float) -> float:
        """Width of the grid on which gradients of records are added."""
        return grid_step(clipping_norm)

    def probe(self, losses: Tensor) -> bytes:
        """The bits of the first record's gradient."""
        return self.grad_sample(losses)[0].cpu().numpy().tobytes()

    def clipped_units(
        self,
        losses: Tensor,
        clip: Callable[[Tensor], Tensor],
        *,
        grid: float,
    ) -> list[Tensor]:
        """The exact sum of ``factor_i * gradient_i``, each rounded towards zero onto the grid.

        Args:
            losses: (n,) one per record, with its graph; see :meth:`grad_sample`.
            clip: (n,) float64 norms of the records' whole gradients to (n,) factors.
            grid: The grid's step (:meth:`grid_step`).

        Returns:
            One int64 sum per parameter, of its shape, in grid steps.
        """
        rows = self.grad_sample(losses)
        total = clipped_units(rows, clip(squared_norms(rows).sqrt()), grid)
        parts = total.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


def _adapted(module: PeftLinear | PeftConv2d, rows_per_record: int) -> _LoraLinear:
    kind = _LoraConv2d if isinstance(module, PeftConv2d) else _LoraLinear
    return kind(module, rows_per_record)
