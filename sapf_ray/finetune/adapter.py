"""LoRA factors on the selected matrices, by peft, saved as diffusers loads them (paper eq. 9)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

WEIGHTS = "pytorch_lora_weights.safetensors"


def add_lora(denoiser: nn.Module, matrices: list[str], rank: int, seed: int, train_a: bool = True) -> dict[str, nn.Parameter]:
    """Injects LoRA (A Gaussian, B zero, scale 1) and returns the trainable factors by name, float32.

    Args:
        matrices: Dotted names of linear layers; nothing else becomes trainable.
        seed: Seeds A, so every worker starts from the same factors.
        train_a: False freezes A.
    """
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(  # type: ignore[operator]
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(matrices))
        )
    trainable: dict[str, nn.Parameter] = {}
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # DP-SGD accumulates in float32 whatever the frozen dtype
            parameter.requires_grad_(train_a or "lora_B" in name)
            if parameter.requires_grad:
                trainable[name] = parameter
    return trainable


def save_adapter(denoiser: nn.Module, directory: Path, values: dict[str, Tensor] | None = None) -> None:
    """Writes ``directory`` so that ``pipe.load_lora_weights(directory)`` loads it; replaced as a whole.

    Args:
        values: Trainable factors to write in place of the current ones (such as their moving average).
    """
    if values is not None:
        load_factors(denoiser, values)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    StableDiffusionPipeline.save_lora_weights(partial, unet_lora_layers=layers, weight_name=WEIGHTS)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load_factors(denoiser: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies factors by name into the model."""
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
