"""The candidate pool: the weight matrices that selection may keep.

Found by structure (a module that owns ``to_q``, ``to_k`` and ``to_v``, or any linear layer or
convolution), so any diffusers U-Net or transformer works without a list of names. Names are those
of ``named_modules``, e.g. ``down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sapf_ray.errors import ConfigError


@dataclass(frozen=True, eq=False)
class WeightRows:
    """A matrix of the pool that is a row slice of a fused weight, such as q in diffusers'
    ``to_qkv``.

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


Matrix = nn.Linear | nn.Conv2d | WeightRows
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
"""Of the text tokens, where text and image attend jointly (SD3, FLUX)."""
FUSED = {"to_qkv": QKV, "to_kv": QKV[1:], "to_added_qkv": ADDED_QKV}
OPTIONAL = (*ADDED_QKV, "to_out.0", "to_add_out")
"""What not every attention layer has: FLUX's single blocks have no output of their own."""


def attention_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every attention layer with its dotted name, in the model's own order."""
    for name, module in denoiser.named_modules():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in QKV):
            yield name, module


def candidate_pool(denoiser: nn.Module, kind: str = "qkv") -> dict[str, Matrix]:
    """Ordered mapping of matrix name to its layer, or to its rows of a fused layer;
    ``K = len(pool)``.

    Args:
        denoiser: U-Net or diffusion transformer; LoRA of peft is looked through.
        kind: ``qkv`` (paper section 3.2; with a transformer's projections of the text, where text
            and image attend jointly), ``qkvo`` (with output projections, as the authors' code),
            ``qkv_no_middle`` (without the U-Net's middle block, paper Table 2), ``cross_q``
            (queries of cross-attention only, paper Table 6) or ``all`` (every linear layer and
            convolution: All-Param, Figure 4).

    Raises:
        ConfigError: The model has no such matrix, or ``all`` meets a layer whose gradients are not
            known.
    """
    if kind == "all":
        return _every_matrix(denoiser)
    parts = {"qkvo": (*QKV, "to_out.0", *ADDED_QKV, "to_add_out"), "cross_q": ("to_q",)}.get(
        kind, (*QKV, *ADDED_QKV)
    )
    pool: dict[str, Matrix] = {}
    for name, layer in attention_layers(denoiser):
        if kind == "qkv_no_middle" and name.startswith("mid_block."):
            continue
        if kind == "cross_q" and not getattr(layer, "is_cross_attention", False):
            continue
        fused = _fused_rows(layer)
        for part in parts:
            if part in OPTIONAL and getattr(layer, part.partition(".")[0], None) is None:
                continue
            matrix = fused.get(part) or base_layer(layer.get_submodule(part))
            assert isinstance(matrix, nn.Linear | WeightRows), f"{name}.{part} is no linear layer"
            pool[f"{name}.{part}"] = matrix
    if not pool and kind == "cross_q":
        raise ConfigError(
            "saliency.pool",
            kind,
            f"must be qkv or qkvo: {type(denoiser).__name__} has no cross-attention layers",
        )
    if not pool:
        raise ConfigError(
            "model.path",
            type(denoiser).__name__,
            "must have attention layers with to_q, to_k, to_v",
        )
    return pool


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that peft wrapped, or the module itself."""
    return getattr(module, "base_layer", module)


def layer_of(matrix: str) -> str:
    """Name of the layer a matrix belongs to: its attention layer, feed-forward layer or residual
    block.

    Example:
        >>> layer_of("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
        'mid_block.attentions.0.transformer_blocks.0.attn1'
        >>> layer_of("mid_block.resnets.0.conv1"), layer_of("conv_in")
        ('mid_block.resnets.0', 'conv_in')
    """
    return re.sub(r"(\.to_out\.0|\.net\.\d+(\.proj)?|\.[^.]+)$", "", matrix)


def _fused_rows(layer: nn.Module) -> dict[str, WeightRows]:
    """The projections that diffusers' ``fuse_projections`` keeps in one weight; the separate ones
    are then unused.
    """
    if not getattr(layer, "fused_projections", False):
        return {}
    rows: dict[str, WeightRows] = {}
    for fused, parts in FUSED.items():
        whole = getattr(layer, fused, None)
        if whole is None:
            continue
        start = 0
        for part in parts:
            width = int(getattr(layer, part).out_features)
            rows[part] = WeightRows(whole, slice(start, start + width))
            start += width
    return rows


def _every_matrix(denoiser: nn.Module) -> dict[str, Matrix]:
    pool: dict[str, Matrix] = {}
    for name, module in denoiser.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or ".lora_" in name:
            continue
        name = name.removesuffix(".base_layer")
        kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        if type(module).forward is not kind.forward or getattr(module, "groups", 1) != 1:
            raise ConfigError(
                "saliency.pool",
                "all",
                f"must be another pool for this model: {name} ({type(module).__name__}) is "
                "neither a plain linear layer nor a convolution of one group",
            )
        pool[name] = module
    for name, layer in attention_layers(denoiser):
        if fused := _fused_rows(layer):
            pool |= {f"{name}.{part}": rows for part, rows in fused.items()}
            for whole in FUSED:
                pool.pop(f"{name}.{whole}", None)
    return pool
