"""What is trained: LoRA factors on the selected matrices (paper eq. 9, by peft), the matrices
themselves, or all weights.

LoRA is saved as diffusers' ``load_lora_weights`` reads it (a DiT pipeline has no such method;
:func:`load_adapter` knows both). Matrices that were trained, or made random, are saved whole, by
name, and replace those of the public model.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapf_ray.config import FinetuneConfig
from sapf_ray.errors import ConfigError, DataError, reason
from sapf_ray.grad_sample.ghost import GhostGradients
from sapf_ray.grad_sample.lora import LoraGradients, conv_limits
from sapf_ray.grad_sample.trained import check_supported
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.pool import Matrix, base_layer, candidate_pool

WEIGHTS = "pytorch_lora_weights.safetensors"
SampleGradients = LoraGradients | GhostGradients
WHOLE_WEIGHTS = "denoiser_weights.safetensors"


def check_adapter(denoiser: nn.Module, matrices: Sequence[str], *, adapter: str) -> None:
    """Checks from names and shapes alone that the matrices can be trained; changes nothing.

    Args:
        denoiser: On any device; the meta device will do.
        matrices: Dotted names of the candidates.
        adapter: ``finetune.adapter``.

    Raises:
        ConfigError: A weight of a layer whose per-sample gradients are not known.
    """
    if adapter != "lora":
        check_supported(denoiser, _whole_weights(denoiser, matrices, adapter=adapter))
        return
    for name in matrices:
        if limits := conv_limits(denoiser.get_submodule(name)):
            raise ConfigError("finetune.adapter", "lora", f"must be direct: {name} is {limits}")


def _whole_weights(
    denoiser: nn.Module, matrices: Sequence[str], *, adapter: str
) -> dict[str, nn.Parameter]:
    """The parameters that are trained as they are, by name."""
    parameters = dict(denoiser.named_parameters())
    if adapter == "full":
        return parameters
    wanted = {f"{name}.weight" for name in matrices}
    return {name: value for name, value in parameters.items() if name in wanted}


def add_adapter(
    denoiser: nn.Module,
    matrices: list[str],
    *,
    config: FinetuneConfig,
    seed: int,
) -> dict[str, nn.Parameter]:
    """Makes what ``config.adapter`` says trainable, all else frozen; trainable parameters by name,
    float32.

    Matrices of the pool ``config.randomize`` that are not trained get their random values here.

    Raises:
        ConfigError: A weight of a layer whose per-sample gradients are not known.
    """
    if config.adapter == "lora":
        trainable = add_lora(
            denoiser,
            matrices,
            rank=config.lora_rank,
            seed=seed,
            train_a=config.train_lora_a,
        )
    else:
        check_adapter(denoiser, matrices, adapter=config.adapter)
        denoiser.requires_grad_(False)
        trainable = _whole_weights(denoiser, matrices, adapter=config.adapter)
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for entry in untrained(denoiser, config.randomize).values():
        randomize(entry.weight, generator)
    return trainable


def untrained(denoiser: nn.Module, pool: str) -> dict[str, Matrix]:
    """The pool's matrices that :func:`add_adapter` left frozen; none of the pool ``none``."""
    if pool == "none":
        return {}
    return {
        name: entry
        for name, entry in candidate_pool(denoiser, pool).items()
        if not entry.weight.requires_grad
        and base_layer(module := denoiser.get_submodule(name)) is module
    }


@torch.no_grad()
def randomize(weight: Tensor, generator: torch.Generator) -> None:
    """Normal values with the weight's own mean and standard deviation, drawn on the CPU in float32.

    The paper ("random values", Figure 4) does not say which; keeping the scale keeps activations in
    range.
    """
    values = torch.randn(weight.shape, generator=generator)
    weight.copy_(values.to(weight.device) * weight.float().std() + weight.float().mean())


def sample_gradients(
    denoiser: nn.Module,
    trainable: dict[str, nn.Parameter],
    *,
    config: FinetuneConfig,
    scale: float = 1.0,
) -> SampleGradients:
    """The per-sample gradient engine that fits the adapter.

    Args:
        denoiser: As :func:`add_adapter` left it.
        trainable: What it returned.
        config: Settings of the stage.
        scale: See :func:`sapf_ray.grad_sample.backprop_scale.backprop_scale`; LoRA's alone, for
            other adapters are trained in float32.
    """
    if config.adapter == "lora":
        return LoraGradients(
            denoiser,
            trainable.values(),
            rows_per_record=config.draws_per_record,
            scale=scale,
        )
    return GhostGradients(denoiser, trainable, rows_per_record=config.draws_per_record)


def save_weights(
    denoiser: nn.Module,
    directory: Path,
    *,
    values: dict[str, Tensor],
    config: FinetuneConfig,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes trained values and random ones so that :func:`load_adapter` finds them; the directory
    is replaced as a whole.

    Args:
        denoiser: As :func:`add_adapter` left it.
        values: Trained parameters by name, to write in place of the current ones (such as their
            moving average).
        config: Settings of the stage.
        beside: Writes further files into the directory.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    whole = {
        f"{name}.weight": entry.weight.detach()
        for name, entry in untrained(denoiser, config.randomize).items()
    }
    if config.adapter == "lora":
        load_factors(denoiser, values)
        prefix = "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"
        factors = {
            f"{prefix}.{name}": value.contiguous()
            for name, value in get_peft_model_state_dict(denoiser).items()
        }
        save_file(factors, partial / WEIGHTS, metadata={"format": "pt"})
    else:
        whole |= values
    if whole:
        save_file(
            {name: value.contiguous() for name, value in whole.items()}, partial / WHOLE_WEIGHTS
        )
    beside(partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load_adapter(pipe: Any, directory: Path) -> None:
    """Puts trained values into the pipeline's own weights: LoRA is merged, whole matrices replace
    the public ones.

    Raises:
        DataError: Missing, damaged or of another model.
    """
    denoiser = denoiser_of(pipe)
    try:
        whole = (directory / WHOLE_WEIGHTS).exists()
        if whole:
            load_factors(denoiser, load_file(directory / WHOLE_WEIGHTS))
        if not whole or (directory / WEIGHTS).exists():
            merge_lora(denoiser, load_file(directory / WEIGHTS))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{directory}: cannot be loaded as an adapter of this model ({reason(error)})"
        ) from error


@torch.no_grad()
def merge_lora(denoiser: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Adds B A to each weight (scale 1), in float32.

    Args:
        factors: ``unet.NAME.lora_A.weight`` and ``unet.NAME.lora_B.weight``, or with
            ``transformer`` in front.

    Raises:
        ValueError: No factors.
        AttributeError, KeyError, RuntimeError: A matrix that the model lacks, a missing factor,
            another shape.
    """
    end = ".lora_A.weight"
    names = [key.removesuffix(end) for key in factors if key.endswith(end)]
    if not names:
        raise ValueError("no LoRA factors in it")
    for name in names:
        weight = denoiser.get_submodule(name.partition(".")[2]).weight
        assert isinstance(weight, Tensor)
        update = factors[f"{name}.lora_B.weight"].float().flatten(1) @ factors[
            name + end
        ].float().flatten(1)
        weight.copy_(weight.float() + update.view(weight.shape).to(weight.device))


def add_lora(
    denoiser: nn.Module,
    matrices: list[str],
    *,
    rank: int,
    seed: int,
    train_a: bool = True,
) -> dict[str, nn.Parameter]:
    """Injects LoRA (A Gaussian, B zero, scale 1) and returns the trainable factors by name,
    float32.

    Args:
        matrices: Dotted names of linear layers or convolutions; nothing else becomes trainable.
        seed: Seeds A, so every worker starts from the same factors.
        train_a: False freezes A.

    Raises:
        ConfigError: LoRA on such a layer has no per-sample gradients here.
    """
    check_adapter(denoiser, matrices, adapter="lora")
    exactly = "|".join(re.escape(name) for name in matrices)  # a list would match ends of names
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=exactly,
        )
        inject_adapter_in_model(lora, denoiser, "default")
    trainable: dict[str, nn.Parameter] = {}
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = (
                parameter.data.float()
            )  # DP-SGD accumulates in float32 whatever the frozen dtype
            parameter.requires_grad_(train_a or "lora_B" in name)
            if parameter.requires_grad:
                trainable[name] = parameter
    return trainable


def save_adapter(
    denoiser: nn.Module,
    directory: Path,
    *,
    values: dict[str, Tensor] | None = None,
) -> None:
    """:func:`save_weights` of LoRA alone."""
    save_weights(
        denoiser,
        directory,
        values=values or {},
        config=FinetuneConfig(),
    )


def load_factors(denoiser: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies factors by name into the model."""
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
