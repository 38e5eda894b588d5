"""What is trained: LoRA factors on the selected matrices (paper eq. 9, by peft), the matrices themselves, or all weights.

LoRA is saved as diffusers loads it. Trained matrices are saved whole, by name, and replace those of the public model.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapf_ray.config import FinetuneConfig
from sapf_ray.errors import DataError
from sapf_ray.finetune.ghost import GhostGradients
from sapf_ray.finetune.lora_gradients import LoraGradients
from sapf_ray.saliency.layer_norms import check_supported

WEIGHTS = "pytorch_lora_weights.safetensors"
SampleGradients = LoraGradients | GhostGradients
WHOLE_WEIGHTS = "denoiser_weights.safetensors"


def add_adapter(denoiser: nn.Module, matrices: list[str], config: FinetuneConfig, seed: int) -> dict[str, nn.Parameter]:
    """Makes what ``config.adapter`` says trainable, all else frozen; trainable parameters by name, float32.

    Raises:
        ConfigError: A weight of a layer whose per-sample gradient norm is not known.
    """
    if config.adapter == "lora":
        return add_lora(denoiser, matrices, config.lora_rank, seed, config.train_lora_a)
    denoiser.requires_grad_(False)
    wanted = {f"{name}.weight" for name in matrices}
    trainable = {n: p for n, p in denoiser.named_parameters() if config.adapter == "full" or n in wanted}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    check_supported(denoiser, trainable)
    return trainable


def sample_gradients(
    denoiser: nn.Module, trainable: dict[str, nn.Parameter], config: FinetuneConfig
) -> SampleGradients:
    """The per-sample gradient engine that fits the adapter."""
    if config.adapter == "lora":
        return LoraGradients(denoiser, trainable.values(), config.draws_per_record)
    return GhostGradients(denoiser, trainable, config.draws_per_record)


def save_weights(denoiser: nn.Module, directory: Path, values: dict[str, Tensor], config: FinetuneConfig) -> None:
    """Writes the trained values so that :func:`load_adapter` finds them; the directory is replaced as a whole."""
    if config.adapter == "lora":
        save_adapter(denoiser, directory, values)
        return
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in values.items()}, partial / WHOLE_WEIGHTS)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load_adapter(pipe: StableDiffusionPipeline, directory: Path) -> None:
    """Puts trained values into the pipeline's own weights: LoRA is merged, whole matrices replace the public ones.

    Raises:
        DataError: Missing, damaged or of another model.
    """
    try:
        if (directory / WHOLE_WEIGHTS).exists():
            load_factors(pipe.unet, load_file(directory / WHOLE_WEIGHTS))
            return
        pipe.load_lora_weights(directory)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{directory}: cannot be loaded as an adapter of this model ({reason})") from error
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()


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
