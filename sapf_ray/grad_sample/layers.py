"""The table of layers whose parameters can be trained whole: how each reduces to squared norms.

Matrices (linear, convolution after unfolding) go through
:func:`sapf_ray.grad_sample.norms.token_squared_norms`; scale and shift parameters are so small that
their per-sample gradients are formed. :data:`LAYERS` holds one row a type: a new type is one row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from sapf_ray.grad_sample.norms import (
    FLOAT,
    MAX_TEMPORARY_BYTES,
    Call,
    chunks,
    fold_tokens,
    join_tokens,
    record_squared_norms,
    squared_norms,
    token_squared_norms,
)


@dataclass(frozen=True, kw_only=True)
class NormQuery:
    """Which norms of a layer are wanted.

    Attributes:
        trained: Local names (``weight``, ``bias``) of the parameters that count.
        rows_per_record: K; the batch has n·K rows, the K rows of a record side by side.
        max_temporary_bytes: Cap on what is allocated at a time.
    """

    trained: Collection[str]
    rows_per_record: int = 1
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES


class SquaredNorms(Protocol):
    """How a row of :data:`LAYERS` computes its norms."""

    def __call__(
        self,
        layer: nn.Module,
        calls: Sequence[Call],
        *,
        query: NormQuery,
    ) -> Tensor:
        """(n,) float64 squared norm of each record's gradient, never too small.

        Args:
            layer: The layer.
            calls: Its calls in one forward pass: their gradients add up to one.
            query: Over which parameters, and how.
        """


def _linear(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    k = query.rows_per_record
    backprops = join_tokens(fold_tokens(call.backprops, k) for call in calls)
    total = backprops.new_zeros(len(backprops), dtype=torch.float64)
    if "weight" in query.trained:
        activations = join_tokens(fold_tokens(call.activations, k) for call in calls)
        total += token_squared_norms(
            activations, backprops, max_temporary_bytes=query.max_temporary_bytes
        )
    if "bias" in query.trained:
        total += squared_norms(backprops.sum(1, dtype=torch.float32))
    return total


def _conv2d(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    backprops = calls[0].backprops
    n = len(backprops) // query.rows_per_record
    total = backprops.new_zeros(n, dtype=torch.float64)
    if "bias" in query.trained:
        per_call = [call.backprops.flatten(2).sum(2, dtype=torch.float32) for call in calls]
        total += record_squared_norms(torch.stack(per_call).sum(0), query.rows_per_record)
    if "weight" in query.trained:
        _add_kernel_norms(
            total,
            layer,
            calls=calls,
            query=query,
        )
    return total


def _add_kernel_norms(
    total: Tensor,
    layer: nn.Conv2d,
    *,
    calls: Sequence[Call],
    query: NormQuery,
) -> None:
    """Adds the kernel's squared norms, which add up over records and blocks of input channels."""
    # half of the cap for the unfolded input (twice: moving the axes copies), half for the norms'
    # own temporaries
    cap = query.max_temporary_bytes // 2
    k = query.rows_per_record
    tokens = k * sum(prod(call.backprops.shape[2:]) for call in calls)
    padded = k * sum(2 * call.activations[0].numel() for call in calls)
    fixed = padded + 2 * tokens * layer.out_channels
    per_channel = 2 * tokens * layer.groups * prod(layer.kernel_size)
    channels = layer.in_channels // layer.groups
    width = min(channels, max(1, (cap // FLOAT - fixed) // per_channel))
    for records in chunks(len(total), FLOAT * (fixed + per_channel * width), cap):
        rows = slice(records.start * k, records.stop * k)
        backprops = join_tokens(
            channel_tokens(
                call.backprops[rows].float().flatten(2),
                layer.groups,
                rows_per_record=k,
            )
            for call in calls
        )
        for block in chunks(channels, 1, width):
            activations = join_tokens(
                patches(
                    layer,
                    call.activations[rows],
                    channels=block,
                    rows_per_record=k,
                )
                for call in calls
            )
            squared = token_squared_norms(activations, backprops, max_temporary_bytes=cap)
            total[records] += squared.unflatten(0, (-1, layer.groups)).sum(1)
            del activations  # before the next block's exists


def channel_tokens(
    x: Tensor,
    groups: int,
    *,
    rows_per_record: int,
) -> Tensor:
    """(n·K, groups·d, L) to (n·groups, K·L, d): each group of a record is a matrix of its own."""
    split = x.unflatten(1, (groups, -1)).unflatten(0, (-1, rows_per_record))  # n K groups d L
    return (
        split.permute(
            0,
            2,
            1,
            4,
            3,
        )
        .flatten(0, 1)
        .flatten(1, 2)
    )


def patches(
    layer: nn.Conv2d,
    x: Tensor,
    *,
    channels: slice,
    rows_per_record: int,
) -> Tensor:
    """Patches of a block of each group's input channels, as the convolution sees them.

    Args:
        layer: The convolution.
        x: (n·K, groups·d, height, width) its input.
        channels: The block, of each group's d channels.
        rows_per_record: K.

    Returns:
        (n·groups, K·L, d in the block x kernel) float32, for L output positions.
    """
    block = x.unflatten(1, (layer.groups, -1))[:, :, channels].flatten(1, 2).float()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # padding by name ("same") can be uneven
    padded = F.pad(block, layer._reversed_padding_repeated_twice, mode=mode)
    unfolded = F.unfold(
        padded,
        layer.kernel_size,
        dilation=layer.dilation,
        stride=layer.stride,
    )
    return channel_tokens(unfolded, layer.groups, rows_per_record=rows_per_record)


def _affine(
    calls: Sequence[Call],
    *,
    query: NormQuery,
    normalize: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale and shift after a normalisation.

    Their gradients of a row are g·x̂ and g, summed over positions.

    Args:
        calls: The layer's calls.
        query: Over which parameters, and how; ``weight`` is the scale, ``bias`` the shift.
        normalize: Input to x̂.
        reduce: (rows, ...) in the shape of the output to (rows, ...) in the parameter's.
    """

    def gradient(call: Call, name: str) -> Tensor:
        rows = call.backprops
        parts = []
        for chunk in chunks(len(rows), 3 * FLOAT * rows[0].numel(), query.max_temporary_bytes):
            product = rows[chunk].float()
            if name == "weight":
                product = product * normalize(call.activations[chunk].float())
            parts.append(reduce(product))
        return torch.cat(parts)

    squared = []
    for name in query.trained:
        rows = sum(gradient(call, name) for call in calls)
        assert isinstance(rows, Tensor)
        squared.append(record_squared_norms(rows, query.rows_per_record))
    return torch.stack(squared).sum(0)


def _group_norm(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    groups = layer.num_groups
    eps = layer.eps
    return _affine(
        calls,
        query=query,
        normalize=lambda x: F.group_norm(x, groups, eps=eps),
        reduce=lambda y: y.flatten(2).sum(2) if y.dim() > 2 else y,
    )


def _layer_norm(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    shape = list(layer.normalized_shape)
    eps = layer.eps
    return _affine(
        calls,
        query=query,
        normalize=lambda x: F.layer_norm(x, shape, eps=eps),
        reduce=lambda y: y.reshape(y.shape[0], -1, prod(shape)).sum(1),
    )


def _rms_norm(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    """Both torch's and diffusers', whose scale runs over the last axis."""
    assert isinstance(layer, nn.RMSNorm | RMSNorm)
    eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
    return _affine(
        calls,
        query=query,
        normalize=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),
        reduce=lambda y: y.reshape(y.shape[0], -1, y.shape[-1]).sum(1),
    )


def _rms_norm_limits(layer: nn.Module) -> str:
    if isinstance(layer, nn.RMSNorm) and len(layer.normalized_shape) != 1:
        return "normalized_shape must be one axis"
    return ""


def _embedding(
    layer: nn.Module,
    calls: Sequence[Call],
    *,
    query: NormQuery,
) -> Tensor:
    """Tokens with the same index share a row of the table.

    Each of them sees its row's whole sum, and counts for its part of it.
    """
    assert isinstance(layer, nn.Embedding)
    k = query.rows_per_record
    tokens = (fold_tokens(call.activations.unsqueeze(-1), k) for call in calls)
    indices = join_tokens(tokens).squeeze(-1)
    backprops = join_tokens(fold_tokens(call.backprops, k) for call in calls)
    n, length, d = backprops.shape
    bytes_each = FLOAT * (3 * length * d + 2 * length * length)
    norms = []
    for records in chunks(n, bytes_each, query.max_temporary_bytes):
        index = indices[records]
        gradient = backprops[records].float()
        if layer.padding_idx is not None:  # that row gets no gradient
            gradient = gradient.masked_fill((index == layer.padding_idx).unsqueeze(-1), 0.0)
        same = (index.unsqueeze(2) == index.unsqueeze(1)).float()
        row_sums = torch.bmm(same, gradient)
        per_token = squared_norms(row_sums.flatten(0, 1)).view(-1, length)
        norms.append((per_token / same.sum(2)).sum(1))
    return torch.cat(norms)


def _embedding_limits(layer: nn.Module) -> str:
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return "max_norm, scale_grad_by_freq and sparse must be off: they mix records"
    return ""


def _no_limits(layer: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class LayerType:
    """One supported kind of layer.

    Attributes:
        squared_norms: Norms of each record's gradient.
        limits: What is wrong with this very layer; empty where nothing is.
    """

    squared_norms: SquaredNorms
    limits: Callable[[nn.Module], str] = _no_limits


LAYERS: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(_linear),
    nn.Conv2d: LayerType(_conv2d),
    nn.GroupNorm: LayerType(_group_norm),
    nn.LayerNorm: LayerType(_layer_norm),
    nn.RMSNorm: LayerType(_rms_norm, _rms_norm_limits),
    RMSNorm: LayerType(_rms_norm),
    nn.Embedding: LayerType(_embedding, _embedding_limits),
}
PARAMETERS = ("weight", "bias")


def layer_type(layer: nn.Module) -> LayerType | None:
    """The row of :data:`LAYERS` for ``layer``; a subclass with its own forward has none."""
    for kind, row in LAYERS.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return row
    return None
