"""Loads a public diffusion pipeline: bundled, by a short name of the catalog, from a local
directory, a single file, or by hub id.

The bundled models are ordinary diffusers directories. What is known
without reading weights is :class:`sapf_ray.models.public_model.PublicModel`.

>>> pipe = load_pipeline("glyphs-tiny")
>>> type(pipe).__name__, type(load_pipeline("glyphs-dit-tiny")).__name__
('StableDiffusionPipeline', 'DiTPipeline')
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from sapf_ray.config import ModelConfig
from sapf_ray.models.checkpoints import checkpoint_of
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.families import Family, image_side, latent_side, read_index, unreadable
from sapf_ray.models.location import as_config, resolve_model


def load_pipeline(model: ModelConfig | str, *, device: str = "cpu") -> Any:
    """The public pipeline, in evaluation mode, all weights frozen.

    Args:
        model: How the user named it; a path alone means the defaults.
        device: Torch device string.

    Raises:
        DataError: The model cannot be found or read.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    config = as_config(model)
    _, family = read_index(config)
    try:
        pipe = _from_files(config, family)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(config, error) from error
    pipe.set_progress_bar_config(disable=True)
    if config.prediction_type is not None:
        pipe.scheduler.register_to_config(prediction_type=config.prediction_type)
    if config.resolution is not None:
        _set_resolution(pipe, config.resolution)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe.to(device)


def _from_files(config: ModelConfig, family: Family) -> Any:
    """The pipeline from its folder, from a single file, or from the hub.

    Weights are mapped from the file where it has their precision, so processes share them.
    """
    place = resolve_model(config)
    dtype = getattr(torch, config.dtype)
    checkpoint = checkpoint_of(config)
    if checkpoint is None:
        return family.pipeline_class.from_pretrained(
            place,
            dtype={"default": dtype, "vae": _vae_dtype(dtype)},
            variant=config.variant,
            revision=config.revision,
            local_files_only=Path(place).is_absolute(),
            **family.options,
        )
    options: dict[str, Any] = {"config": place, "local_files_only": True}
    vae = AutoencoderKL.from_single_file(
        str(checkpoint), subfolder="vae", dtype=_vae_dtype(dtype), **options
    )
    return family.pipeline_class.from_single_file(
        str(checkpoint), vae=vae, dtype=dtype, **options, **family.options
    )


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, in which Stable Diffusion's VAE overflows."""
    return torch.float32 if dtype == torch.float16 else dtype


@functools.lru_cache(maxsize=1)
def kept_pipeline(model: ModelConfig, device: str) -> Any:
    """:func:`load_pipeline`, kept by a worker process between its tasks.

    Code that changes the pipeline must load its own.
    """
    return load_pipeline(model, device=device)


def resolution_of(pipe: Any) -> int:
    """Side in pixels of the images that a loaded pipeline is given and makes."""
    return image_side(denoiser_of(pipe).config, pipe.vae.config)


def _set_resolution(pipe: Any, side: int) -> None:
    """Makes another side the pipeline's own, for all that asks it: no stage can forget it.

    A U-Net takes any side. A DiT has interpolated its positions from the grid it was built for, and
    goes on doing so: the config is changed once it is built.
    """
    denoiser = denoiser_of(pipe)
    size = latent_side(denoiser.config) * side // resolution_of(pipe)
    denoiser.register_to_config(sample_size=size)
