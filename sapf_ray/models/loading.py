"""Loads a public diffusion pipeline: bundled, by a short name of the catalog, from a local
directory, or by hub id.

One path for all of them: the bundled models are ordinary diffusers directories. What is known
without reading weights is :class:`sapf_ray.models.public_model.PublicModel`.

>>> pipe = load_pipeline("glyphs-tiny")
>>> type(pipe).__name__, type(load_pipeline("glyphs-dit-tiny")).__name__
('StableDiffusionPipeline', 'DiTPipeline')
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from sapf_ray.config import ModelConfig
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.families import image_side, read_index, unreadable
from sapf_ray.models.location import resolve_model


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
    config = ModelConfig(path=model) if isinstance(model, str) else model
    _, family = read_index(config.path)
    try:
        pipe = family.pipeline_class.from_pretrained(
            resolve_model(config.path), dtype=getattr(torch, config.dtype), **family.options
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(config.path, error) from error
    pipe.set_progress_bar_config(disable=True)
    if config.resolution is not None:
        _set_resolution(pipe, config.resolution)
    for module in (denoiser_of(pipe), pipe.vae, getattr(pipe, "text_encoder", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return pipe.to(device)


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
    size = int(denoiser.config.sample_size) * side // resolution_of(pipe)
    denoiser.register_to_config(sample_size=size)
