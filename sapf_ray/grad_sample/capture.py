"""Per-sample gradient norms of weight matrices without per-sample gradients.

For a linear layer with input ``a`` (B, T, d_in) and output gradient ``g`` (B, T, d_out) the
gradient of record b is ``g_b^T a_b``. Its Frobenius norm comes from the T x T Gram products
``sum(a_b a_b^T * g_b g_b^T)`` [1, 2] or from instantiating one d_out x d_in product, whichever
costs fewer operations for that layer; a convolution is a linear layer on the unfolded patches of
its input. Frozen weights get no gradient of their own and back-propagation stops at the first layer
of the pool.

The same captured tensors give the clipped sum ``sum_b c_b g_b^T a_b`` with one matrix product per
layer (book-keeping [3]): no second backward pass.

1. Goodfellow, "Efficient per-example gradient computations", 2015.
2. Li et al., "Large language models can be strong differentially private learners", ICLR 2022.
3. Bu et al., "Differentially private optimization on large model at small cost", ICML 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from sapf_ray.grad_sample.norms import (
    FLOAT,
    LAYERS,
    MAX_TEMPORARY_BYTES,
    Use,
    channel_tokens,
    fold_tokens,
    patches,
    pieces,
    token_squared_norms,
)
from sapf_ray.models.pool import Matrix, WeightRows

Pool = Mapping[str, Matrix]
Layer = nn.Linear | nn.Conv2d


def gradient_norms(
    a: Tensor, g: Tensor, *, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """‖g_bᵀ a_b‖_F for each record b, in float32.

    Args:
        a: (B, T, d_in) layer input.
        g: (B, T, d_out) gradient of the loss with respect to the layer output.
        max_temporary_bytes: Cap on what is allocated at a time.

    Returns:
        (B,) norms.
    """
    return token_squared_norms(a, g, max_temporary_bytes=max_temporary_bytes).sqrt()


def weighted_norms(
    a: Tensor, g: Tensor, *, weight: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """``sum_ij |W_ij (g_bᵀ a_b)_ij|`` for each record b, in float32: what the record's loss says of
    the weights' worth.

    Args:
        a: (B, T, d_in) layer input.
        g: (B, T, d_out) gradient of the loss with respect to the layer output.
        weight: (d_out, d_in) W.
        max_temporary_bytes: Cap on what is allocated at a time, above one record's tokens.

    Returns:
        (B,) norms.
    """
    (n, tokens, d_in), d_out = a.shape, g.shape[2]
    width = min(d_out, max(1, max_temporary_bytes // (2 * FLOAT * (d_in + tokens))))
    total = torch.zeros(n, device=a.device)
    magnitude = weight.detach().abs().to(a.device)
    for records in pieces(
        n, FLOAT * (tokens * (d_in + width) + 2 * width * d_in), max_temporary_bytes
    ):
        inputs = a[records].float()
        for out in pieces(d_out, 1, width):  # the sum splits over output features
            gradient = torch.bmm(g[records, :, out].float().mT, inputs).abs_()
            total[records] += gradient.mul_(magnitude[out].float()).sum((1, 2))
    return total


class PoolCapture:
    """Hooks on the pool's layers during one forward and backward pass.

    Args:
        pool: Name to linear layer or convolution of one group, or to row slice of a linear layer;
            weights must be frozen.
        keep: Keep inputs and output gradients for :meth:`clipped_sum`; otherwise each layer's
            tensors are reduced to norms and freed as soon as back-propagation passes it.
        rows_per_record: k; the batch has n·k rows, the k rows of a record side by side, and a
            record's gradient is the sum over its rows.
        max_temporary_bytes: Cap on what norms and sums allocate at a time, their results aside.
        weighted: Take :func:`weighted_norms` instead of gradient norms.
        closed: Names of matrices that count as zero in the forward pass; their gradients are those
            at zero, their weights in weighted norms the real ones.

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
        closed: Collection[str] = (),
    ) -> None:
        self.pool, self.keep, self.weighted, self.closed = pool, keep, weighted, frozenset(closed)
        self.rows_per_record, self.max_temporary_bytes = rows_per_record, max_temporary_bytes
        self._entries: dict[
            Layer, dict[str, slice]
        ] = {}  # slices of one layer share its captured tensors
        for name, entry in pool.items():
            layer, rows = (
                (entry.layer, entry.rows) if isinstance(entry, WeightRows) else (entry, slice(None))
            )
            self._entries.setdefault(layer, {})[name] = rows
        self._norms: dict[str, Tensor] = {}
        self._captured: dict[str, list[Use]] = {}
        self._calls: Counter[Layer] = (
            Counter()
        )  # in the forward pass; a layer used twice has the sum of both gradients
        self._uses: dict[Layer, list[Use]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> PoolCapture:
        for layer, entries in self._entries.items():
            if layer.weight.requires_grad:
                raise ValueError(
                    f"{next(iter(entries))}: pool weights must be frozen while norms are captured"
                )
        for layer in self._entries:
            self._handles.append(layer.register_forward_hook(self._forward_hook))
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, Layer)
        a = inputs[0].detach()
        version = a._version
        self._calls[layer] += 1
        output = self._close(layer, output)
        if not output.requires_grad:
            output.requires_grad_(True)  # a leaf: back-propagation starts and ends here
        output.register_hook(lambda g: self._reduce(layer, a, version=version, g=g.detach()))
        return output

    def _close(self, layer: Layer, output: Tensor) -> Tensor:
        """The output without the closed matrices: where they stood, the bias is left."""
        rows = [rows for name, rows in self._entries[layer].items() if name in self.closed]
        if not rows:
            return output
        stays = torch.ones(layer.weight.shape[0], dtype=torch.bool, device=output.device)
        for part in rows:
            stays[part] = False
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = (
            torch.zeros_like(stays, dtype=output.dtype)
            if layer.bias is None
            else layer.bias.to(output.dtype)
        )
        return torch.where(stays.view(shape), output, bias.view(shape))

    def _reduce(self, layer: Layer, a: Tensor, *, version: int, g: Tensor) -> None:
        name = next(iter(self._entries[layer]))
        if name in self._norms:
            raise RuntimeError(f"{name}: a second backward pass")
        if a._version != version:  # a frozen weight does not make autograd watch its input
            raise RuntimeError(f"{name}: its input was changed in place after the forward pass")
        if isinstance(layer, nn.Linear):
            a, g = fold_tokens(a, self.rows_per_record), fold_tokens(g, self.rows_per_record)
        uses = self._uses.setdefault(layer, [])
        uses.append((a, g))
        if len(uses) >= self._calls[layer]:
            self._finish(layer)

    def _finish(self, layer: Layer) -> None:
        uses = self._uses.pop(layer)
        with torch.autocast(uses[0][1].device.type, enabled=False):
            for name, rows in self._entries[layer].items():
                part = [(a, g if isinstance(layer, nn.Conv2d) else g[..., rows]) for a, g in uses]
                self._norms[name] = self._norm(layer, rows, uses=part)
                if self.keep:
                    self._captured[name] = part

    def _norm(self, layer: Layer, rows: slice, *, uses: list[Use]) -> Tensor:
        cap = self.max_temporary_bytes
        if self.weighted:
            weight = layer.weight[rows].flatten(1)
            return torch.cat(
                [
                    weighted_norms(a, g, weight=weight, max_temporary_bytes=cap)
                    for a, g in self._tokens(layer, uses)
                ]
            )
        if isinstance(layer, nn.Conv2d):
            return (
                LAYERS[nn.Conv2d]
                .squared_norms(layer, uses, ("weight",), self.rows_per_record, cap)
                .sqrt()
            )
        return torch.cat(
            [gradient_norms(a, g, max_temporary_bytes=cap) for a, g in self._tokens(layer, uses)]
        )

    def _tokens(self, layer: Layer, uses: list[Use]) -> Iterator[Use]:
        """Inputs (n, T, d_in) and output gradients (n, T, d_out), all records at once or, unfolded,
        some at a time.

        Further uses of the layer are further tokens.
        """
        if isinstance(layer, nn.Linear):
            yield (
                uses[0]
                if len(uses) == 1
                else (torch.cat([a for a, _ in uses], 1), torch.cat([g for _, g in uses], 1))
            )
            return
        k, d_in = self.rows_per_record, layer.weight[0].numel()
        each = (
            FLOAT
            * k
            * sum(2 * a[0].numel() + g[0, 0].numel() * (2 * d_in + 2 * g.shape[1]) for a, g in uses)
        )
        for records in pieces(len(uses[0][1]) // k, each, self.max_temporary_bytes):
            rows = slice(records.start * k, records.stop * k)
            a = torch.cat([patches(layer, a[rows], block=slice(None), k=k) for a, _ in uses], 1)
            yield (
                a,
                torch.cat([channel_tokens(g[rows].float().flatten(2), 1, k=k) for _, g in uses], 1),
            )

    def norms(self) -> Tensor:
        """(n, K) per-sample norm of each matrix, float32, in the pool's order."""
        for layer in list(self._uses):  # a call that no gradient reached
            self._finish(layer)
        missing = [name for name in self.pool if name not in self._norms]
        if missing:
            raise RuntimeError(
                f"no gradient reached {missing[0]} and {len(missing) - 1} other matrices"
            )
        return torch.stack([self._norms[name] for name in self.pool], dim=1)

    def clipped_sum(self, factors: Tensor) -> list[Tensor]:
        """``sum_b factors_b * gradient_b`` of each matrix, float32, shaped like its weight.

        Args:
            factors: (n,) clip factors; a record with factor 0 is left out, whatever its gradient
                is.
        """
        sums = []
        for name, entry in self.pool.items():
            layer = entry.layer if isinstance(entry, WeightRows) else entry
            total, start = torch.zeros(entry.weight.shape, device=entry.weight.device).flatten(1), 0
            for a, g in self._tokens(layer, self._captured[name]):
                self._add_clipped(total, a, g=g, factors=factors[start : start + len(a)])
                start += len(a)
            sums.append(total.view(entry.weight.shape))
        return sums

    def _add_clipped(self, total: Tensor, a: Tensor, *, g: Tensor, factors: Tensor) -> None:
        (_, tokens, d_in), d_out = a.shape, g.shape[2]
        weights = factors.to(g.device, torch.float32).repeat_interleave(tokens).unsqueeze(1)
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        # float32 copies of both, each once more with the left-out records blanked
        for rows in pieces(len(a), 2 * FLOAT * (d_in + d_out), self.max_temporary_bytes):
            # a record that overflowed has factor 0 and must not turn the sum into NaN
            left_out = weights[rows] == 0
            weighted = (g[rows].float() * weights[rows]).masked_fill_(left_out, 0.0)
            total.addmm_(weighted.mT, a[rows].float().masked_fill(left_out, 0.0))
