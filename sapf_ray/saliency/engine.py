"""Per-sample gradient norms of weight matrices without per-sample gradients.

For a linear layer with input ``a`` (B, T, d_in) and output gradient ``g`` (B, T, d_out) the gradient of
record b is ``g_b^T a_b``. Its Frobenius norm comes from the T x T Gram products
``sum(a_b a_b^T * g_b g_b^T)`` [1, 2] or from instantiating one d_out x d_in product, whichever costs fewer
operations for that layer. Frozen weights get no gradient of their own and back-propagation stops at the
first layer of the pool.

The same captured tensors give the clipped sum ``sum_b c_b g_b^T a_b`` with one matrix product per layer
(book-keeping [3]): no second backward pass.

1. Goodfellow, "Efficient per-example gradient computations", 2015.
2. Li et al., "Large language models can be strong differentially private learners", ICLR 2022.
3. Bu et al., "Differentially private optimization on large model at small cost", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from sapf_ray.saliency.layer_norms import FLOAT, MAX_TEMPORARY_BYTES, fold_tokens, pieces, token_squared_norms


@dataclass(frozen=True, eq=False)
class WeightRows:
    """A matrix of the pool that is a row slice of a fused weight, such as q in diffusers' ``to_qkv``.

    Attributes:
        layer: The fused layer.
        rows: Slice of its output features, step 1.

    Example:
        >>> fused = nn.Linear(8, 24)
        >>> WeightRows(fused, slice(8, 16)).weight.shape
        torch.Size([8, 8])
    """

    layer: nn.Linear
    rows: slice

    @property
    def weight(self) -> Tensor:
        """(rows, d_in) view of the fused weight."""
        return self.layer.weight[self.rows]


Pool = Mapping[str, nn.Linear | WeightRows]


def gradient_norms(a: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """‖g_bᵀ a_b‖_F for each record b, in float32.

    Args:
        a: (B, T, d_in) layer input.
        g: (B, T, d_out) gradient of the loss with respect to the layer output.
        max_temporary_bytes: Cap on what is allocated at a time.

    Returns:
        (B,) norms.
    """
    return token_squared_norms(a, g, max_temporary_bytes).sqrt()


class PoolCapture:
    """Hooks on the pool's linear layers during one forward and backward pass.

    Args:
        pool: Name to linear layer, or to row slice of one; weights must be frozen.
        keep: Keep inputs and output gradients for :meth:`clipped_sum`; otherwise each layer's tensors
            are reduced to norms and freed as soon as back-propagation passes it.
        rows_per_record: k; the batch has n·k rows, the k rows of a record side by side, and a record's
            gradient is the sum over its rows.
        max_temporary_bytes: Cap on what norms and sums allocate at a time, their results aside.

    Example:
        >>> layer = nn.Linear(3, 2).requires_grad_(False)
        >>> with PoolCapture({"w": layer}) as capture:
        ...     layer(torch.ones(4, 5, 3)).sum().backward()
        >>> capture.norms().shape
        torch.Size([4, 1])
    """

    def __init__(
        self, pool: Pool, keep: bool = False, rows_per_record: int = 1, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
    ) -> None:
        self.pool, self.keep = pool, keep
        self.rows_per_record, self.max_temporary_bytes = rows_per_record, max_temporary_bytes
        self._entries: dict[nn.Linear, dict[str, slice]] = {}  # slices of one layer share its captured tensors
        for name, entry in pool.items():
            layer, rows = (entry.layer, entry.rows) if isinstance(entry, WeightRows) else (entry, slice(None))
            self._entries.setdefault(layer, {})[name] = rows
        self._norms: dict[str, Tensor] = {}
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> PoolCapture:
        for layer, entries in self._entries.items():
            if layer.weight.requires_grad:
                raise ValueError(f"{next(iter(entries))}: pool weights must be frozen while norms are captured")
        for layer in self._entries:
            self._handles.append(layer.register_forward_hook(self._forward_hook))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        a = inputs[0].detach()
        version = a._version
        if not output.requires_grad:
            output.requires_grad_(True)  # a leaf: back-propagation starts and ends here
        output.register_hook(lambda g: self._reduce(layer, a, version, g.detach()))

    def _reduce(self, layer: nn.Linear, a: Tensor, version: int, g: Tensor) -> None:
        entries = self._entries[layer]
        name = next(iter(entries))
        if name in self._norms:
            raise RuntimeError(f"{name}: used twice in one forward pass; its per-sample norm does not separate")
        if a._version != version:  # a frozen weight does not make autograd watch its input
            raise RuntimeError(f"{name}: its input was changed in place after the forward pass")
        a, g = fold_tokens(a, self.rows_per_record), fold_tokens(g, self.rows_per_record)
        with torch.autocast(g.device.type, enabled=False):
            for name, rows in entries.items():
                self._norms[name] = gradient_norms(a, g[..., rows], self.max_temporary_bytes)
                if self.keep:
                    self._captured[name] = (a, g[..., rows])

    def norms(self) -> Tensor:
        """(n, K) per-sample gradient norm of each matrix, float32, in the pool's order."""
        missing = [name for name in self.pool if name not in self._norms]
        if missing:
            raise RuntimeError(f"no gradient reached {missing[0]} and {len(missing) - 1} other matrices")
        return torch.stack([self._norms[name] for name in self.pool], dim=1)

    def clipped_sum(self, factors: Tensor) -> list[Tensor]:
        """``sum_b factors_b * gradient_b`` of each matrix, float32 (d_out, d_in).

        Args:
            factors: (n,) clip factors; a record with factor 0 is left out, whatever its gradient is.
        """
        return [self._clipped_sum(*self._captured[name], factors) for name in self.pool]

    def _clipped_sum(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        (_, tokens, d_in), d_out = a.shape, g.shape[2]
        total = torch.zeros(d_out, d_in, device=g.device)
        weights = factors.to(g.device, torch.float32).repeat_interleave(tokens).unsqueeze(1)
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        # float32 copies of both, each once more with the left-out records blanked
        for rows in pieces(len(a), 2 * FLOAT * (d_in + d_out), self.max_temporary_bytes):
            # a record that overflowed has factor 0 and must not turn the sum into NaN
            left_out = weights[rows] == 0
            weighted = (g[rows].float() * weights[rows]).masked_fill_(left_out, 0.0)
            total.addmm_(weighted.mT, a[rows].float().masked_fill(left_out, 0.0))
        return total
