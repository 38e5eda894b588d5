"""Squared per-sample gradient norms of every kind of trainable layer, without per-sample gradients
in memory.

A layer's inputs and output gradients are enough. Matrices (linear, convolution after unfolding) go
through :func:`token_squared_norms`, which takes the T x T Gram products [1, 2] or instantiates the
product, whichever is cheaper [3]; scale and shift parameters are so small that their per-sample
gradients are formed.

Everything is computed in float32 whatever the type of the forward pass, cast piece by piece, and
every temporary stays below ``max_temporary_bytes``. Nothing here waits for the device.

:data:`LAYERS` is the table of supported layers: a new type is one row.

1. Goodfellow, "Efficient per-example gradient computations", 2015.
2. Li et al., "Large language models can be strong differentially private learners", ICLR 2022.
3. Bu, Mao, Xu, "Scalable and efficient training of large convolutional neural networks with
   differential privacy", NeurIPS 2022 (mixed ghost clipping; convolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapf_ray.errors import ConfigError

MAX_TEMPORARY_BYTES = 256 * 2**20
FLOAT = 4  # bytes

Use = tuple[Tensor, Tensor]
"""One call of a layer: its input and the gradient of its output, batch axis first."""

# Gram sums can cancel down to their rounding error. A norm that comes out too small would let a
# record pass the
# clipping norm, so a few units in the last place of the summed magnitudes are added: the norm errs
# upwards.
GRAM_MARGIN = 4 * torch.finfo(torch.float32).eps


def norm_route(tokens: int, d_in: int, *, d_out: int) -> Literal["gram", "instantiate"]:
    """The cheaper way to ‖gᵀa‖_F for a (T, d_in) and g (T, d_out).

    The Gram products cost T²(d_in + d_out) multiplications, the product itself T·d_in·d_out. Where
    Gram is cheaper it is also the smaller: T < d_in·d_out / (d_in + d_out) gives 2T² <= d_in·d_out
    / 2.

    Example:
        >>> norm_route(4096, 320, 320), norm_route(64, 1280, 1280)  # Stable Diffusion 1.5, first
        and last level ('instantiate', 'gram')
    """
    return "gram" if tokens * (d_in + d_out) < d_in * d_out else "instantiate"


def pieces(length: int, bytes_each: int, max_temporary_bytes: int) -> Iterator[slice]:
    """Slices of ``range(length)``, each of at most ``max_temporary_bytes`` and at least one
    element.
    """
    size = max(1, max_temporary_bytes // max(1, bytes_each))
    for start in range(0, max(1, length), size):  # an empty axis gives one empty piece
        yield slice(start, start + size)


def _gram_sum(products: Tensor) -> Tensor:
    """Sum over the last two axes of the elementwise product of two Gram matrices, rounded upwards;
    overwrites it.
    """
    total = products.sum((-2, -1))
    return total.clamp_min(0) + GRAM_MARGIN * products.abs_().sum((-2, -1))


def _block_squared_norms(a: Tensor, g: Tensor, *, route: str) -> Tensor:
    a, g = a.float(), g.float()
    if route == "gram":
        return _gram_sum(torch.bmm(a, a.mT).mul_(torch.bmm(g, g.mT)))
    return torch.linalg.vector_norm(torch.bmm(g.mT, a), dim=(1, 2)).square()


def token_squared_norms(
    a: Tensor, g: Tensor, *, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """‖g_bᵀ a_b‖_F² for each record b.

    Args:
        a: (n, T, d_in) inputs, any floating type.
        g: (n, T, d_out) output gradients.
        max_temporary_bytes: Cap on what is allocated at a time.

    Returns:
        (n,) float32.
    """
    (n, tokens, d_in), d_out = a.shape, g.shape[2]
    route = norm_route(tokens, d_in, d_out=d_out)
    result = 2 * tokens * tokens if route == "gram" else d_in * d_out
    per_record = FLOAT * (tokens * (d_in + d_out) + result)
    if per_record <= max_temporary_bytes:
        return torch.cat(
            [
                _block_squared_norms(a[rows], g[rows], route=route)
                for rows in pieces(n, per_record, max_temporary_bytes)
            ]
        )
    # one record is too large: squared norms add up over the blocks of the product
    width = max(1, max_temporary_bytes // (FLOAT * (2 * tokens + max(d_in, d_out))))
    norms = []
    for row in range(n):
        total = a.new_zeros(1, dtype=torch.float32)
        for i in range(0, d_in, width):
            for o in range(0, d_out, width):
                total = total + _block_squared_norms(
                    a[row : row + 1, :, i : i + width],
                    g[row : row + 1, :, o : o + width],
                    route="instantiate",
                )
        norms.append(total)
    return torch.cat(norms)


def fold_tokens(x: Tensor, rows_per_record: int) -> Tensor:
    """(n·k, ..., d), record-major, to (n, k·T, d): the rows of a record become further tokens."""
    if x.shape[0] % rows_per_record:
        raise ValueError(
            f"batch axis of {x.shape[0]} rows does not split into {rows_per_record} rows per record"
        )
    return x.reshape(x.shape[0] // rows_per_record, -1, x.shape[-1])


def _squared(rows: Tensor, rows_per_record: int) -> Tensor:
    """(n·k, ...) per-row gradients to (n,) squared norms of their sums over each record's rows."""
    return rows.flatten(1).unflatten(0, (-1, rows_per_record)).sum(1).square().sum(1)


def _side_by_side(tokens: Iterable[Tensor]) -> Tensor:
    """(n, T, d) of each use of a layer to (n, sum of T, d); most layers are used once, and nothing
    is copied.
    """
    parts = list(tokens)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _linear(
    layer: nn.Module, uses: Sequence[Use], trained: Collection[str], k: int, cap: int
) -> Tensor:
    g = _side_by_side(fold_tokens(y, k) for _, y in uses)
    total = torch.zeros(len(g), device=g.device)
    if "weight" in trained:
        total = total + token_squared_norms(
            _side_by_side(fold_tokens(x, k) for x, _ in uses), g, max_temporary_bytes=cap
        )
    if "bias" in trained:
        total = total + g.sum(1, dtype=torch.float32).square().sum(1)
    return total


def _conv2d(
    layer: nn.Module, uses: Sequence[Use], trained: Collection[str], k: int, cap: int
) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    rows = uses[0][1].shape[0]
    total = torch.zeros(rows // k, device=uses[0][1].device)
    if "bias" in trained:
        total = total + _squared(
            torch.stack([g.flatten(2).sum(2, dtype=torch.float32) for _, g in uses]).sum(0), k
        )
    if "weight" not in trained:
        return total
    kernel, channels = prod(layer.kernel_size), layer.in_channels // layer.groups
    tokens = k * sum(prod(g.shape[2:]) for _, g in uses)
    padded = k * sum(2 * x[0].numel() for x, _ in uses)
    # half of the cap for the unfolded input (twice: moving the axes copies), half for the norms'
    # own temporaries
    fixed = padded + 2 * tokens * layer.out_channels
    per_channel = 2 * tokens * layer.groups * kernel
    width = min(channels, max(1, (cap // (2 * FLOAT) - fixed) // per_channel))
    for records in pieces(rows // k, FLOAT * (fixed + per_channel * width), cap // 2):
        part = slice(records.start * k, records.stop * k)
        g = _side_by_side(
            channel_tokens(y[part].float().flatten(2), layer.groups, k=k) for _, y in uses
        )
        squared = torch.zeros(len(g), device=g.device)
        for c in range(0, channels, width):  # squared norms add up over blocks of input channels
            a = _side_by_side(
                patches(layer, x[part], block=slice(c, c + width), k=k) for x, _ in uses
            )
            squared = squared + token_squared_norms(a, g, max_temporary_bytes=cap // 2)
            del a
        total[records] += squared.unflatten(0, (-1, layer.groups)).sum(1)
    return total


def channel_tokens(x: Tensor, groups: int, *, k: int) -> Tensor:
    """(n·k, groups·d, L) to (n·groups, k·L, d): each group of a record is a matrix of its own."""
    x = x.unflatten(1, (groups, -1)).unflatten(0, (-1, k))  # n k G d L
    return x.permute(0, 2, 1, 4, 3).flatten(0, 1).flatten(1, 2)


def patches(layer: nn.Conv2d, x: Tensor, *, block: slice, k: int) -> Tensor:
    """(n·groups, k·L, d) patches of a block of each group's input channels, as the convolution sees
    them.
    """
    x = x.unflatten(1, (layer.groups, -1))[:, :, block].flatten(1, 2).float()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(
        x, layer._reversed_padding_repeated_twice, mode=mode
    )  # also "same", which can be uneven
    x = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return channel_tokens(x, layer.groups, k=k)


def _affine(
    uses: Sequence[Use],
    trained: Collection[str],
    *,
    k: int,
    cap: int,
    normalize: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale and shift after a normalisation: their per-row gradients are g·x̂ and g, summed over
    positions.
    """
    gradients: dict[str, Tensor] = {}
    for x, g in uses:
        for name in trained:
            parts = []
            for rows in pieces(len(g), 3 * FLOAT * g[0].numel(), cap):
                y = g[rows].float()
                parts.append(reduce(y * normalize(x[rows].float()) if name == "weight" else y))
            whole = torch.cat(parts)
            gradients[name] = gradients[name] + whole if name in gradients else whole
    return torch.stack([_squared(rows, k) for rows in gradients.values()]).sum(0)


def _group_norm(
    layer: nn.Module, uses: Sequence[Use], trained: Collection[str], k: int, cap: int
) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    groups, eps = layer.num_groups, layer.eps
    return _affine(
        uses,
        trained,
        k=k,
        cap=cap,
        normalize=lambda x: F.group_norm(x, groups, eps=eps),
        reduce=lambda y: y.flatten(2).sum(2) if y.dim() > 2 else y,
    )


def _layer_norm(
    layer: nn.Module, uses: Sequence[Use], trained: Collection[str], k: int, cap: int
) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    shape, eps = list(layer.normalized_shape), layer.eps
    return _affine(
        uses,
        trained,
        k=k,
        cap=cap,
        normalize=lambda x: F.layer_norm(x, shape, eps=eps),
        reduce=lambda y: y.reshape(y.shape[0], -1, prod(shape)).sum(1),
    )


def _embedding(
    layer: nn.Module, uses: Sequence[Use], trained: Collection[str], k: int, cap: int
) -> Tensor:
    """Tokens with the same index share a row of the table: each sees its row's whole sum, and
    counts for its part of it.
    """
    assert isinstance(layer, nn.Embedding)
    index = _side_by_side(fold_tokens(x.unsqueeze(-1), k) for x, _ in uses).squeeze(-1)
    g = _side_by_side(fold_tokens(y, k) for _, y in uses)
    n, tokens, d = g.shape
    norms = []
    for rows in pieces(n, FLOAT * (3 * tokens * d + 2 * tokens * tokens), cap):
        i, y = index[rows], g[rows].float()
        if layer.padding_idx is not None:
            y = y.masked_fill(
                (i == layer.padding_idx).unsqueeze(-1), 0.0
            )  # that row gets no gradient
        same = (i.unsqueeze(2) == i.unsqueeze(1)).float()
        norms.append((torch.bmm(same, y).square_().sum(2) / same.sum(2)).sum(1))
    return torch.cat(norms)


def _embedding_limits(layer: nn.Module) -> str:
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return "max_norm, scale_grad_by_freq and sparse must be off: they mix records"
    return ""


NormFunction = Callable[[nn.Module, Sequence[Use], Collection[str], int, int], Tensor]


@dataclass(frozen=True)
class LayerType:
    """One supported kind of layer.

    Attributes:
        squared_norms: (layer, uses, names of trained parameters, rows per record, byte cap) to (n,)
            float32 squared norms over those parameters together. Several uses in one forward pass
            are one gradient, their sum.
        limits: What is wrong with this very layer; empty where nothing is.
    """

    squared_norms: NormFunction
    limits: Callable[[nn.Module], str] = lambda layer: ""


LAYERS: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(_linear),
    nn.Conv2d: LayerType(_conv2d),
    nn.GroupNorm: LayerType(_group_norm),
    nn.LayerNorm: LayerType(_layer_norm),
    nn.Embedding: LayerType(_embedding, _embedding_limits),
}
PARAMETERS = ("weight", "bias")


def layer_type(layer: nn.Module) -> LayerType | None:
    """The row of :data:`LAYERS` that computes what ``layer`` computes; a subclass with its own
    forward has none.
    """
    for kind, row in LAYERS.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return row
    return None


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedLayer:
    """A layer that owns trained parameters.

    Attributes:
        name: Dotted name in the model.
        parameters: Local name (``weight``, ``bias``) to position in the caller's parameters.
    """

    name: str
    layer: nn.Module
    type: LayerType
    parameters: dict[str, int]

    def squared_norms(
        self, uses: Sequence[Use], rows_per_record: int, *, max_temporary_bytes: int
    ) -> Tensor:
        """(n,) squared norm of each record's gradient of this layer's trained parameters."""
        return self.type.squared_norms(
            self.layer, uses, self.parameters, rows_per_record, max_temporary_bytes
        )


def trained_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[TrainedLayer]:
    """The layers of ``model`` that own ``parameters``.

    Args:
        parameters: Name (for messages) to parameter of the model.

    Raises:
        ConfigError: A parameter is not in the model, is shared between layers, or belongs to a
            layer without a row in :data:`LAYERS`; or the model has a layer that mixes the records
            of a batch.
    """
    position = {id(p): i for i, p in enumerate(parameters.values())}
    names = list(parameters)
    owner: dict[int, str] = {}  # position to module name
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        ):
            raise _unsupported(
                name,
                "is batch normalisation, which mixes the records of a batch; no record has its own gradient",
            )
        local = {
            n: position[id(p)]
            for n, p in module._parameters.items()
            if p is not None and id(p) in position
        }
        for i in local.values():
            if i in owner:
                raise _unsupported(
                    names[i], f"is shared by modules {owner[i]!r} and {name!r}; leave it frozen"
                )
            owner[i] = name
        if local:
            layers.append(
                TrainedLayer(
                    name=name, layer=module, type=_row(module, name, local, names), parameters=local
                )
            )
    missing = [name for i, name in enumerate(names) if i not in owner]
    if missing:
        raise _unsupported(missing[0], f"must be a parameter of the {type(model).__name__}")
    return layers


def _row(module: nn.Module, name: str, local: dict[str, int], names: list[str]) -> LayerType:
    row = layer_type(module)
    unknown = [n for n in local if row is None or n not in PARAMETERS]
    limits = row.limits(module) if row else ""
    if row is not None and not unknown and not limits:
        return row
    where = f"belongs to module {name or '(the model itself)'!r} of type {type(module).__name__}"
    kinds = ", ".join(kind.__name__ for kind in LAYERS)
    why = limits or f"per-sample gradient norms exist for weight and bias of {kinds}"
    raise _unsupported(
        names[local[unknown[0] if unknown else next(iter(local))]],
        f"{where}; {why}; leave it frozen",
    )


def _unsupported(name: str, why: str) -> ConfigError:
    return ConfigError("trained parameter", name, why)


def check_supported(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises before any data is read if some parameter's per-sample norm cannot be computed.

    Raises:
        ConfigError: As :func:`trained_layers`; it names the parameter, its module and what is
            supported.
    """
    trained_layers(model, parameters)
