"""Squared norms of per-sample gradients of a matrix, without per-sample gradients in memory.

A layer's ``activations`` (its input) and ``backprops`` (the gradient of its output) are enough:
:func:`token_squared_norms` takes the T x T Gram products [1, 2] or instantiates the gradient,
whichever is cheaper [3].

**Norms never err downwards**: a norm that came out too small would let a record's clipped
contribution pass the clipping norm. Forward types of any precision are cast to float32 chunk by
chunk; squares are added in float64, and what float32 rounding can have taken away is put back
(:data:`RUN_MARGIN`, :func:`_gram_margin`). Every temporary stays below ``max_temporary_bytes``, and
nothing here waits for the device.

1. Goodfellow, "Efficient per-example gradient computations", 2015.
2. Li et al., "Large language models can be strong differentially private learners", ICLR 2022.
3. Bu, Mao, Xu, "Scalable and efficient training of large convolutional neural networks with
   differential privacy", NeurIPS 2022 (mixed ghost clipping; convolutions).
4. Higham, Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.,
   2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_TEMPORARY_BYTES = 256 * 2**20
FLOAT = 4  # bytes
UNIT_ROUNDOFF = 2.0**-24  # of float32

RUN = 64
"""Squares of so many neighbours are added in float32, the runs' sums in float64."""

RUN_MARGIN = 2.0**-17
"""More than the relative error of a run: RUN + 2 roundings of at most 2^-24 each."""


class Call(NamedTuple):
    """One call of a layer in the forward pass; the batch axis comes first in both tensors.

    Attributes:
        activations: The layer's input.
        backprops: The gradient of the losses' sum with respect to the layer's output.
    """

    activations: Tensor
    backprops: Tensor


def norm_route(
    tokens: int,
    d_in: int,
    *,
    d_out: int,
) -> Literal["gram", "instantiate"]:
    """The cheaper way to ‖gᵀa‖_F for a (T, d_in) and g (T, d_out).

    The Gram products cost T²(d_in + d_out) multiplications, the product itself T·d_in·d_out. Where
    Gram is cheaper it is also the smaller: T < d_in·d_out / (d_in + d_out) gives
    2T² <= d_in·d_out / 2.

    Example:
        First and last level of Stable Diffusion 1.5:

        >>> norm_route(4096, 320, d_out=320)
        'instantiate'
        >>> norm_route(64, 1280, d_out=1280)
        'gram'
    """
    if tokens * (d_in + d_out) < d_in * d_out:
        return "gram"
    return "instantiate"


def chunks(
    length: int,
    bytes_each: int,
    max_temporary_bytes: int,
) -> Iterator[slice]:
    """Slices of ``range(length)``, each of at most ``max_temporary_bytes``, at least one element.

    An empty range gives one empty slice.
    """
    size = max(1, max_temporary_bytes // max(1, bytes_each))
    for start in range(0, max(1, length), size):
        yield slice(start, start + size)


def squared_norms(rows: Tensor) -> Tensor:
    """(n, ...) float32 to (n,) float64 squared norm of each row, never below the exact one."""
    flat = rows.flatten(1)
    in_runs = flat.shape[1] // RUN * RUN
    runs = flat[:, :in_runs].unflatten(1, (-1, RUN))
    rest = flat[:, in_runs:]
    of_runs = torch.linalg.vector_norm(runs, dim=2).double().square_().sum(1)
    of_rest = torch.linalg.vector_norm(rest, dim=1).double().square_()
    return of_runs.add_(of_rest).mul_(1 + RUN_MARGIN)


def round_up(values: Tensor) -> Tensor:
    """float64 to float32, never downwards."""
    return (values * (1 + 2 * UNIT_ROUNDOFF)).float()


def _gram_margin(d: int) -> float:
    """Relative rounding error of the product of two Gram entries, each a sum of d products.

    Eight times the standard deviation √d·u of a sum's error [4]: more than that is a matter of
    exp(-8²/2) where roundings are independent. The sure bound d·u would cost a percent of the norm.
    """
    return 2 * 8 * sqrt(d) * UNIT_ROUNDOFF


def _gram_squared_norms(activations: Tensor, backprops: Tensor) -> Tensor:
    """(n,) float64: the sum of the elementwise product of both Gram matrices.

    The sum may cancel down to the rounding error of its terms, which is bounded by
    ``margin * ‖a_s‖‖a_t‖‖g_s‖‖g_t‖`` for the pair of tokens (s, t): their sum is added.
    """
    of_inputs = torch.bmm(activations, activations.mT)
    of_outputs = torch.bmm(backprops, backprops.mT)
    token_squares = of_inputs.diagonal(dim1=1, dim2=2) * of_outputs.diagonal(dim1=1, dim2=2)
    bound = token_squares.clamp_min_(0).sqrt_().sum(1, dtype=torch.float64).square_()
    total = of_inputs.mul_(of_outputs).sum((1, 2), dtype=torch.float64)
    margin = _gram_margin(max(activations.shape[2], backprops.shape[2]))
    return total.clamp_min_(0).add_(bound, alpha=margin)


def _chunk_squared_norms(
    activations: Tensor,
    backprops: Tensor,
    *,
    route: str,
) -> Tensor:
    activations = activations.float()
    backprops = backprops.float()
    if route == "gram":
        return _gram_squared_norms(activations, backprops)
    return squared_norms(torch.bmm(backprops.mT, activations))


def token_squared_norms(
    activations: Tensor,
    backprops: Tensor,
    *,
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
) -> Tensor:
    """‖g_bᵀ a_b‖_F² for each record b, never below the exact value but for rounding of the product.

    Args:
        activations: (n, T, d_in) a, any floating type.
        backprops: (n, T, d_out) g.
        max_temporary_bytes: Cap on what is allocated at a time.

    Returns:
        (n,) float64.
    """
    n, tokens, d_in = activations.shape
    d_out = backprops.shape[2]
    route = norm_route(tokens, d_in, d_out=d_out)
    products = 2 * tokens * tokens if route == "gram" else d_in * d_out
    bytes_each = FLOAT * (tokens * (d_in + d_out) + products)
    if bytes_each > max_temporary_bytes:
        return _block_by_block(activations, backprops, max_temporary_bytes=max_temporary_bytes)
    norms = [
        _chunk_squared_norms(activations[records], backprops[records], route=route)
        for records in chunks(n, bytes_each, max_temporary_bytes)
    ]
    return torch.cat(norms)


def _block_by_block(
    activations: Tensor,
    backprops: Tensor,
    *,
    max_temporary_bytes: int,
) -> Tensor:
    """Where one record is too large: squared norms add up over blocks of the gradient."""
    n, tokens, d_in = activations.shape
    d_out = backprops.shape[2]
    bytes_a_column = FLOAT * (2 * tokens + max(d_in, d_out))
    norms = activations.new_zeros(n, dtype=torch.float64)
    for record in range(n):
        one = slice(record, record + 1)
        for columns in chunks(d_in, bytes_a_column, max_temporary_bytes):
            for rows in chunks(d_out, bytes_a_column, max_temporary_bytes):
                norms[one] += _chunk_squared_norms(
                    activations[one, :, columns], backprops[one, :, rows], route="instantiate"
                )
    return norms


def fold_tokens(x: Tensor, rows_per_record: int) -> Tensor:
    """(n·K, ..., d), record-major, to (n, K·T, d): the K rows of a record become further tokens.

    Raises:
        ValueError: The batch axis is not a multiple of K.
    """
    if x.shape[0] % rows_per_record:
        raise ValueError(
            f"batch axis of {x.shape[0]} rows does not split into {rows_per_record} rows per record"
        )
    return x.reshape(x.shape[0] // rows_per_record, -1, x.shape[-1])


def join_tokens(tokens: Iterable[Tensor]) -> Tensor:
    """(n, T, d) of each call of a layer to (n, sum of T, d); a single one is not copied."""
    parts = list(tokens)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def record_squared_norms(rows: Tensor, rows_per_record: int) -> Tensor:
    """(n·K, ...) gradients of rows to (n,) squared norms of their sums over each record's rows."""
    records = rows.flatten(1).unflatten(0, (-1, rows_per_record))
    return squared_norms(records.sum(1))
