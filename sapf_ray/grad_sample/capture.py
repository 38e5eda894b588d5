"""Per-sample gradient norms of weight matrices without per-sample gradients.

For a linear layer with activations ``a`` (B, T, d_in) and backprops ``g`` (B, T, d_out) the
gradient of record b is ``g_b^T a_b``. Its Frobenius norm comes from the T x T Gram products
``sum(a_b a_b^T * g_b g_b^T)`` [1, 2] or from instantiating one d_out x d_in product, whichever
costs fewer operations for that layer; a convolution is a linear layer on the unfolded patches of
its input. Frozen weights get no gradient of their own and back-propagation stops at the first layer
of the pool.

The same captured tensors give the gradients themselves, one matrix product per record and layer
(book-keeping [3]): no second backward pass.

1. Goodfellow, "Efficient per-example gradient computations", 2015.
2. Li et al., "Large language models can be strong differentially private learners", ICLR 2022.
3. Bu et al., "Differentially private optimization on large model at small cost", ICML 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from sapf_ray.grad_sample.layers import LAYERS, NormQuery, channel_tokens, patches
from sapf_ray.grad_sample.norms import (
    FLOAT,
    MAX_TEMPORARY_BYTES,
    Call,
    chunks,
    fold_tokens,
    join_tokens,
    round_up,
    token_squared_norms,
)
from sapf_ray.models.pool import Matrix, WeightRows

Pool = Mapping[str, Matrix]
Layer = nn.Linear | nn.Conv2d


def gradient_norms(
    activations: Tensor,
    backprops: Tensor,
    *,
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
) -> Tensor:
    """‖g_bᵀ a_b‖_F for each record b, never too small.

    Args:
        activations: (B, T, d_in) a.
        backprops: (B, T, d_out) g.
        max_temporary_bytes: Cap on what is allocated at a time.

    Returns:
        (B,) float32 norms.
    """
    squared = token_squared_norms(activations, backprops, max_temporary_bytes=max_temporary_bytes)
    return round_up(squared.sqrt())


def weighted_norms(
    activations: Tensor,
    backprops: Tensor,
    *,
    weight: Tensor,
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
) -> Tensor:
    """``sum_ij |W_ij (g_bᵀ a_b)_ij|`` for each record b: what its loss says of the weights' worth.

    Args:
        activations: (B, T, d_in) a.
        backprops: (B, T, d_out) g.
        weight: (d_out, d_in) W.
        max_temporary_bytes: Cap on what is allocated at a time, above one record's tokens.

    Returns:
        (B,) float32 norms.
    """
    n, tokens, d_in = activations.shape
    d_out = backprops.shape[2]
    width = min(d_out, max(1, max_temporary_bytes // (2 * FLOAT * (d_in + tokens))))
    bytes_each = FLOAT * (tokens * (d_in + width) + 2 * width * d_in)
    total = torch.zeros(n, device=activations.device)
    magnitude = weight.detach().abs().to(activations.device)
    for records in chunks(n, bytes_each, max_temporary_bytes):
        inputs = activations[records].float()
        for features in chunks(d_out, 1, width):  # the sum splits over output features
            gradient = torch.bmm(backprops[records, :, features].float().mT, inputs)
            gradient.abs_().mul_(magnitude[features].float())
            total[records] += gradient.sum((1, 2))
    return total


class PoolCapture:
    """Hooks on the pool's layers during one forward and backward pass.

    Args:
        pool: Name to linear layer or convolution of one group, or to row slice of a linear layer;
            weights must be frozen.
        keep: Keep activations and backprops for :meth:`gradients`; otherwise each layer's tensors
            are reduced to norms and freed as soon as back-propagation passes it.
        rows_per_record: K; the batch has n·K rows, the K rows of a record side by side, and a
            record's gradient is the sum over its rows.
        max_temporary_bytes: Cap on what norms and sums allocate at a time, their results aside.
        weighted: Take :func:`weighted_norms` instead of gradient norms.
        pruned: Names of matrices that count as zero in the forward pass; their gradients are those
            at zero, their weights in weighted norms the real ones.
        scale: What the losses are multiplied by (:func:`backprop_scale`); norms and gradients are
            those without it.

    Example:
        >>> layer = nn.Linear(3, 2).requires_grad_(False)
        >>> with PoolCapture({"w": layer}) as capture:
        ...     layer(torch.ones(4, 5, 3)).sum().backward()
        >>> capture.norms().shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        pool: Pool,
        keep: bool = False,
        *,
        rows_per_record: int = 1,
        max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
        weighted: bool = False,
        pruned: Collection[str] = (),
        scale: float = 1.0,
    ) -> None:
        self.pool = pool
        self.scale = scale
        self.keep = keep
        self.weighted = weighted
        self.pruned = frozenset(pruned)
        self.rows_per_record = rows_per_record
        self.max_temporary_bytes = max_temporary_bytes
        # slices of one layer share its captured tensors
        self._slices: dict[Layer, dict[str, slice]] = {}
        for name, matrix in pool.items():
            layer, rows = _layer_and_rows(matrix)
            self._slices.setdefault(layer, {})[name] = rows
        # a layer called twice has the sum of both calls' gradients
        self._expected_calls: Counter[Layer] = Counter()
        self._pending: dict[Layer, list[Call]] = {}
        self._captured: dict[str, list[Call]] = {}
        self._norms: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> PoolCapture:
        for layer, slices in self._slices.items():
            if layer.weight.requires_grad:
                raise ValueError(
                    f"{next(iter(slices))}: pool weights must be frozen while norms are captured"
                )
        for layer in self._slices:
            self._handles.append(layer.register_forward_hook(self._forward_hook))
        return self

    def __exit__(self, *exception: type | BaseException | TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(
        self,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        assert isinstance(layer, Layer)
        activations = inputs[0].detach()
        version = activations._version
        self._expected_calls[layer] += 1
        output = self._without_pruned(layer, output)
        if not output.requires_grad:
            output.requires_grad_(True)  # a leaf: back-propagation starts and ends here

        def backward_hook(gradient: Tensor) -> None:
            self._check_first_and_unchanged(layer, activations, version=version)
            self._receive(layer, activations, backprops=gradient.detach())

        output.register_hook(backward_hook)
        return output

    def _without_pruned(self, layer: Layer, output: Tensor) -> Tensor:
        """The output without the pruned matrices: where they stood, the bias is left."""
        pruned = [rows for name, rows in self._slices[layer].items() if name in self.pruned]
        if not pruned:
            return output
        stays = torch.ones(layer.weight.shape[0], dtype=torch.bool, device=output.device)
        for rows in pruned:
            stays[rows] = False
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = torch.zeros_like(stays) if layer.bias is None else layer.bias
        return torch.where(stays.view(shape), output, bias.to(output.dtype).view(shape))

    def _check_first_and_unchanged(
        self,
        layer: Layer,
        activations: Tensor,
        *,
        version: int,
    ) -> None:
        name = next(iter(self._slices[layer]))
        if name in self._norms:
            raise RuntimeError(f"{name}: a second backward pass")
        # a frozen weight does not make autograd watch its input
        if activations._version != version:
            raise RuntimeError(f"{name}: its input was changed in place after the forward pass")

    def _receive(
        self,
        layer: Layer,
        activations: Tensor,
        *,
        backprops: Tensor,
    ) -> None:
        if isinstance(layer, nn.Linear):
            activations = fold_tokens(activations, self.rows_per_record)
            backprops = fold_tokens(backprops, self.rows_per_record)
        calls = self._pending.setdefault(layer, [])
        calls.append(Call(activations, backprops))
        if len(calls) >= self._expected_calls[layer]:
            self._finish(layer)

    def _finish(self, layer: Layer) -> None:
        calls = self._pending.pop(layer)
        with torch.autocast(calls[0].backprops.device.type, enabled=False):
            for name, rows in self._slices[layer].items():
                part = calls
                if isinstance(layer, nn.Linear):
                    part = [call._replace(backprops=call.backprops[..., rows]) for call in calls]
                self._norms[name] = self._norms_of(layer, rows, calls=part)
                if self.keep:
                    self._captured[name] = part

    def _norms_of(
        self,
        layer: Layer,
        rows: slice,
        *,
        calls: Sequence[Call],
    ) -> Tensor:
        cap = self.max_temporary_bytes
        if self.weighted:
            weight = layer.weight[rows].flatten(1)
            norms = [
                weighted_norms(*tokens, weight=weight, max_temporary_bytes=cap)
                for tokens in self._tokens(layer, calls)
            ]
            return torch.cat(norms)
        if isinstance(layer, nn.Linear):
            norms = [
                gradient_norms(*tokens, max_temporary_bytes=cap)
                for tokens in self._tokens(layer, calls)
            ]
            return torch.cat(norms)
        query = NormQuery(
            trained=("weight",), rows_per_record=self.rows_per_record, max_temporary_bytes=cap
        )
        return round_up(LAYERS[nn.Conv2d].squared_norms(layer, calls, query=query).sqrt())

    def _tokens(self, layer: Layer, calls: Sequence[Call]) -> Iterator[Call]:
        """Activations (n, T, d_in) and backprops (n, T, d_out) of a layer.

        All records at once or, unfolded, some at a time. Further calls of the layer are further
        tokens.
        """
        if isinstance(layer, nn.Linear):
            yield Call(
                join_tokens(call.activations for call in calls),
                join_tokens(call.backprops for call in calls),
            )
            return
        k = self.rows_per_record
        n = len(calls[0].backprops) // k
        bytes_each = FLOAT * k * sum(_unfolded_numbers(layer, call) for call in calls)
        for records in chunks(n, bytes_each, self.max_temporary_bytes):
            rows = slice(records.start * k, records.stop * k)
            unfolded = [
                patches(
                    layer,
                    call.activations[rows],
                    channels=slice(None),
                    rows_per_record=k,
                )
                for call in calls
            ]
            outputs = [
                channel_tokens(call.backprops[rows].float().flatten(2), 1, rows_per_record=k)
                for call in calls
            ]
            yield Call(torch.cat(unfolded, 1), torch.cat(outputs, 1))

    def norms(self) -> Tensor:
        """(n, number of matrices) per-sample norms, float32, in the pool's order."""
        for layer in list(self._pending):  # a call that no gradient reached
            self._finish(layer)
        missing = [name for name in self.pool if name not in self._norms]
        if missing:
            raise RuntimeError(
                f"no gradient reached {missing[0]} and {len(missing) - 1} other matrices"
            )
        return torch.stack([self._norms[name] for name in self.pool], dim=1) / self.scale

    def gradients(self) -> Iterator[tuple[int, int, Tensor]]:
        """Per-sample gradients, matrix by matrix and some records at a time.

        Yields:
            Number of the matrix in the pool, number of the first record, and (n, d_out, d_in)
            float32 gradients. Records come in order; a second pass gives the same values.
        """
        for number, (name, matrix) in enumerate(self.pool.items()):
            layer, _ = _layer_and_rows(matrix)
            first = 0
            for activations, backprops in self._tokens(layer, self._captured[name]):
                d_in = activations.shape[2]
                d_out = backprops.shape[2]
                bytes_each = FLOAT * (activations.shape[1] * (d_in + d_out) + 2 * d_in * d_out)
                for records in chunks(len(activations), bytes_each, self.max_temporary_bytes):
                    inputs = activations[records].float()
                    rows = torch.bmm(backprops[records].float().mT, inputs)
                    yield number, first + records.start, rows.div_(self.scale)
                first += len(activations)


def _layer_and_rows(matrix: Matrix) -> tuple[Layer, slice]:
    if isinstance(matrix, WeightRows):
        return matrix.layer, matrix.rows
    return matrix, slice(None)


def _unfolded_numbers(layer: nn.Conv2d, call: Call) -> int:
    """Numbers that unfolding one batch row of a call takes, temporaries included."""
    positions = call.backprops[0, 0].numel()
    d_in = layer.weight[0].numel()
    d_out = call.backprops.shape[1]
    return 2 * call.activations[0].numel() + positions * (2 * d_in + 2 * d_out)
