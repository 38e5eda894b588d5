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

from types import TracebackType

import torch
from torch import Tensor, nn


def gradient_norms(a: Tensor, g: Tensor) -> Tensor:
    """‖g_bᵀ a_b‖_F for each record b, in float32.

    Args:
        a: (B, T, d_in) layer input.
        g: (B, T, d_out) gradient of the loss with respect to the layer output.

    Returns:
        (B,) norms.
    """
    a, g = a.float(), g.float()
    tokens, d_in, d_out = a.shape[1], a.shape[2], g.shape[2]
    if tokens * (d_in + d_out) < d_in * d_out:
        squared = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        return squared.clamp_min(0).sqrt()  # rounding can leave a tiny negative
    return torch.bmm(g.mT, a).flatten(1).norm(dim=1)


class PoolCapture:
    """Hooks on the pool's linear layers during one forward and backward pass.

    Args:
        pool: Name to linear layer; weights must be frozen.
        keep: Keep inputs and output gradients for :meth:`clipped_sum`; otherwise each layer's tensors
            are reduced to norms and freed as soon as back-propagation passes it.

    Example:
        >>> layer = nn.Linear(3, 2).requires_grad_(False)
        >>> with PoolCapture({"w": layer}) as capture:
        ...     layer(torch.ones(4, 5, 3)).sum().backward()
        >>> capture.norms().shape
        torch.Size([4, 1])
    """

    def __init__(self, pool: dict[str, nn.Linear], keep: bool = False) -> None:
        self.pool, self.keep = pool, keep
        self._norms: dict[str, Tensor] = {}
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> PoolCapture:
        for name, layer in self.pool.items():
            if layer.weight.requires_grad:
                raise ValueError(f"{name}: pool weights must be frozen while norms are captured")
            self._handles.append(layer.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a = inputs[0].detach()
            if not output.requires_grad:
                output.requires_grad_(True)  # a leaf: back-propagation starts and ends here
            output.register_hook(lambda g: self._reduce(name, a, g.detach()))

        return hook

    def _reduce(self, name: str, a: Tensor, g: Tensor) -> None:
        if name in self._norms:
            raise RuntimeError(f"{name}: used twice in one forward pass; its per-sample norm does not separate")
        if a.dim() == 2:
            a, g = a.unsqueeze(1), g.unsqueeze(1)
        self._norms[name] = gradient_norms(a, g)
        if self.keep:
            self._captured[name] = (a, g)

    def norms(self) -> Tensor:
        """(B, K) per-sample gradient norm of each matrix, float32, in the pool's order."""
        missing = [name for name in self.pool if name not in self._norms]
        if missing:
            raise RuntimeError(f"no gradient reached {missing[0]} and {len(missing) - 1} other matrices")
        return torch.stack([self._norms[name] for name in self.pool], dim=1)

    def clipped_sum(self, factors: Tensor) -> list[Tensor]:
        """``sum_b factors_b * gradient_b`` of each matrix, float32 (d_out, d_in).

        Args:
            factors: (B,) clip factors.
        """
        sums = []
        for name in self.pool:
            a, g = self._captured[name]
            weighted = g.float() * factors.to(g.device, torch.float32).view(-1, 1, 1)
            # a record whose gradient overflowed has factor 0 and must not turn the sum into NaN
            weighted = torch.where(factors.view(-1, 1, 1) == 0, torch.zeros_like(weighted), weighted)
            sums.append(weighted.flatten(0, 1).mT @ a.float().flatten(0, 1))
        return sums
