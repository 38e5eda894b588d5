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


def load_pipeline(path: str, dtype: str = "float32", *, device: str = "cpu") -> Any:
    """The public pipeline, in evaluation mode, all weights frozen.

    Args:
        path: Bundled or catalog name, directory or hub id.
        dtype: ``float32`` or ``bfloat16``.
        device: Torch device string.

    Raises:
        DataError: The model cannot be found or read.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    _, family = read_index(path)
    try:
        pipe = family.pipeline_class.from_pretrained(
            resolve_model(path), dtype=getattr(torch, dtype), **family.options
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(path, error) from error
    pipe.set_progress_bar_config(disable=True)
    for module in (denoiser_of(pipe), pipe.vae, getattr(pipe, "text_encoder", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return pipe.to(device)


@functools.lru_cache(maxsize=1)
def kept_pipeline(model: ModelConfig, device: str) -> Any:
    """:func:`load_pipeline`, kept by a worker process between its tasks.

    Code that changes the pipeline must load its own.
    """
    return load_pipeline(model.path, model.dtype, device=device)


def native_resolution(pipe: Any) -> int:
    """Side of the images the pipeline makes, in pixels."""
    return image_side(denoiser_of(pipe).config, pipe.vae.config)
