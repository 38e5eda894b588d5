"""The candidate pool: the attention projection matrices that selection may keep.

Found by structure (a module that owns ``to_q``, ``to_k`` and ``to_v``), so any diffusers U-Net or
transformer works without a list of names. Names are those of ``named_modules``, e.g.
``down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sapf_ray.errors import ConfigError


def attention_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every attention layer with its dotted name, in the model's own order."""
    for name, module in denoiser.named_modules():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in ("to_q", "to_k", "to_v")):
            yield name, module


def candidate_pool(denoiser: nn.Module, kind: str = "qkv") -> dict[str, nn.Linear]:
    """Ordered mapping of matrix name to its linear layer; ``K = len(pool)``.

    Args:
        denoiser: U-Net or diffusion transformer.
        kind: ``qkv`` (paper section 3.2), ``qkvo`` (with output projections, as the authors' code),
            ``qkv_no_middle`` (without the U-Net's middle block, paper Table 2) or ``cross_q`` (queries of
            cross-attention only, paper Table 6).

    Raises:
        ConfigError: The model has no such matrix.
    """
    parts = {"qkvo": ("to_q", "to_k", "to_v", "to_out.0"), "cross_q": ("to_q",)}.get(kind, ("to_q", "to_k", "to_v"))
    pool: dict[str, nn.Linear] = {}
    for name, layer in attention_layers(denoiser):
        if kind == "qkv_no_middle" and name.startswith("mid_block."):
            continue
        if kind == "cross_q" and not getattr(layer, "is_cross_attention", False):
            continue
        for part in parts:
            matrix = layer.get_submodule(part)
            assert isinstance(matrix, nn.Linear), f"{name}.{part} is no linear layer"
            pool[f"{name}.{part}"] = matrix
    if not pool:
        what = "cross-attention" if kind == "cross_q" else "attention"
        raise ConfigError("model.path", type(denoiser).__name__, f"must have {what} layers with to_q, to_k, to_v")
    return pool
