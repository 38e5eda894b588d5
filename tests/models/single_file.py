"""The tiny pipeline as the one file in which Stable Diffusion was first published (CompVis' names).

The inverse of what diffusers does on loading, written after its conversion script.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_UNET = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
)
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def save_single_file(pipe: Any, path: Path, *, without: str = "") -> Path:
    """Writes a whole checkpoint.

    Args:
        pipe: A pipeline of two U-Net levels.
        path: The file.
        without: Beginning of the names that are left out.
    """
    tensors: dict[str, Tensor] = {}
    levels = len(pipe.unet.config.block_out_channels)
    for name, value in pipe.unet.state_dict().items():
        layers = pipe.unet.config.layers_per_block
        tensors["model.diffusion_model." + _unet_name(name, layers)] = value
    for name, value in pipe.vae.state_dict().items():
        is_matrix = ".attentions." in name and value.ndim == 2
        shaped = value[:, :, None, None] if is_matrix else value
        tensors["first_stage_model." + _vae_name(name, levels)] = shaped
    for name, value in pipe.text_encoder.state_dict().items():
        whole = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors["cond_stage_model.transformer." + whole] = value
    kept = {
        name: value.clone().contiguous()
        for name, value in tensors.items()
        if not without or not name.startswith(without)
    }
    save_file(kept, path, metadata={"format": "pt"})
    return path


def _unet_name(name: str, layers: int) -> str:
    for pattern, replacement in _UNET:
        name = re.sub(pattern, replacement, name)
    each = layers + 1

    def sampler(match: re.Match[str]) -> str:
        block = int(match[2])
        if match[1] == "down":
            return f"input_blocks.{each * (block + 1)}.0.op."
        return f"output_blocks.{each * block + layers}.1.conv."

    def layer(match: re.Match[str]) -> str:
        place = each * int(match[2]) + int(match[4])
        kind = 0 if match[3] == "resnets" else 1
        if match[1] == "down":
            return f"input_blocks.{place + 1}.{kind}."
        return f"output_blocks.{place}.{kind}."

    name = re.sub(r"^(down|up)_blocks\.(\d)\.\w+samplers\.0\.conv\.", sampler, name)
    name = re.sub(r"^(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", layer, name)
    name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)
    if ".transformer_blocks." in name:
        return name
    for ours, theirs in _UNET_RESNET.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    if "attn_1" in name:
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)

    def up(match: re.Match[str]) -> str:
        level = levels - 1 - int(match[1])
        return f"up.{level}.block.{match[2]}"

    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", up, name)
    name = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name
    )
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
