"""Per-sample gradients of LoRA factors at the price of an ordinary backward pass.

A LoRA layer computes ``y = x (W + s B A)^T`` with W frozen. Its factors are thin, so a record's gradients

    dA = s (g B)^T x   (r, d_in)          dB = s g^T (x A^T)   (d_out, r)

cost about r / d of the products that back-propagation makes anyway. :class:`LoraGradients` replaces peft's
forward (four products, five saved tensors) by one autograd node that multiplies with the merged matrix and
leaves both per-sample gradients behind as it passes. Nothing else is kept: frozen weights have no gradient,
and autograd stops below the first adapter by itself, for nothing there requires one.

Opacus's hooks, for comparison, save every activation a second time, compute the summed gradient of each
factor besides the per-sample one, and wrap every module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from sapf_ray.privacy.noise import clipped_sum


class _Layer:
    """One adapted matrix: its parameters, and the per-sample gradients the last backward pass left."""

    def __init__(self, module: PeftLinear, rows_per_record: int) -> None:
        (name,) = module.active_adapters
        if module.lora_variant or not isinstance(module.lora_dropout[name], nn.Identity):
            raise ValueError(f"{type(module).__name__}: only plain LoRA without dropout has these gradients")
        self.base = module.get_base_layer()
        self.a: nn.Parameter = module.lora_A[name].weight
        self.b: nn.Parameter = module.lora_B[name].weight
        self.scale = float(module.scaling[name])
        self.rows_per_record = rows_per_record
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return _LoraLinear.apply(x, self.a, self.b, self)

    def merged(self, dtype: torch.dtype) -> Tensor | None:
        """W + s B A, or None in a precision whose rounding of W would swallow a small update."""
        weight = self.base.weight
        if weight.dtype != torch.float32 or dtype != torch.float32:
            return None
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)

    def take(self, parameter: nn.Parameter) -> Tensor:
        """(n, *shape) per-sample gradient, float32; forgotten here."""
        return self.gradients.pop(parameter)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: _Layer) -> Tensor:
        weight = layer.merged(x.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, a, b, *(() if weight is None else (weight,)))
        if weight is not None:
            return F.linear(x, weight, layer.base.bias)
        update = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return layer.base(x) + layer.scale * update

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (g,) = upstream
        layer: _Layer = ctx.layer
        x, a, b, *merged = ctx.saved_tensors
        if layer.gradients:
            raise RuntimeError("an adapted matrix was used twice in one forward pass, or its gradients were not taken")
        # a record's draws are tokens of one longer sequence
        records = x.shape[0] // layer.rows_per_record
        tokens, gradient = x.reshape(records, -1, x.shape[-1]), g.reshape(records, -1, g.shape[-1])
        thin = gradient @ b.to(g.dtype)
        if layer.a.requires_grad:
            layer.gradients[layer.a] = layer.scale * torch.bmm(thin.mT, tokens).float()
        layer.gradients[layer.b] = layer.scale * torch.bmm(gradient.mT, tokens @ a.to(x.dtype).mT).float()
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if merged:
            return g @ merged[0], None, None, None
        return g @ layer.base.weight + layer.scale * (thin.view(*g.shape[:-1], -1) @ a.to(g.dtype)), None, None, None


class LoraGradients:
    """Clipped sums of per-sample gradients of a model's LoRA factors.

    Installs itself in the peft layers of ``denoiser``; :meth:`remove` gives them their own forward back.

    Args:
        denoiser: A model with one LoRA adapter (:func:`sapf_ray.finetune.adapter.add_lora`).
        parameters: The trainable factors; sums come in this order.
        rows_per_record: Rows of the batch that belong to one record, record after record.
    """

    def __init__(self, denoiser: nn.Module, parameters: Iterable[nn.Parameter], rows_per_record: int = 1) -> None:
        self.parameters = list(parameters)
        self._modules = [m for m in denoiser.modules() if isinstance(m, PeftLinear)]
        self._layers = [_Layer(module, rows_per_record) for module in self._modules]
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
        losses.sum().backward()
        rows = torch.cat([self._owner[p].take(p).flatten(1) for p in self.parameters], dim=1)
        total = clipped_sum(rows, clip(torch.linalg.vector_norm(rows, dim=1)))
        parts = total.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
