"""A text-to-image model's text encoder by itself: a fraction of the model's weights.

>>> states, cut = text_states("glyphs-tiny", ["An image of the digit three", "very " * 20])
>>> states.shape, cut
(torch.Size([2, 16, 64]), [False, True])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from sapf_ray.config import ModelConfig
from sapf_ray.models.checkpoints import checkpoint_of
from sapf_ray.models.families import read_index, unreadable
from sapf_ray.models.location import as_config, resolve_model
from sapf_ray.models.weight_files import variants_of


@torch.no_grad()
def text_states(model: ModelConfig | str, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
    """States of prompts as the denoiser is given them, on the CPU.

    Args:
        model: How the user named a text-to-image model; a path alone means the defaults.
        prompts: n prompts.

    Returns:
        float32 (n, L, d), and whether each prompt is cut off at L tokens.

    Raises:
        DataError: The model cannot be found or read.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer, encoder = _tokenizer_and_encoder(as_config(model))
    length = tokenizer.model_max_length
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    whole = tokenizer(list(prompts), truncation=False)["input_ids"]
    states = encoder(tokens.input_ids)[0].float()
    return states, [len(ids) > length for ids in whole]


def _tokenizer_and_encoder(config: ModelConfig) -> tuple[Any, Any]:
    if checkpoint_of(config) is not None:
        from sapf_ray.models.loading import load_pipeline  # diffusers

        pipe = load_pipeline(config)  # maps the other weights, and does not read them
        return pipe.tokenizer, pipe.text_encoder
    index, _ = read_index(config)
    place = resolve_model(config)
    weights = {"variant": _variant_of(place, config.variant), "revision": config.revision}
    try:
        tokenizer = _load(index["tokenizer"][1], place, folder="tokenizer")
        encoder = _load(index["text_encoder"][1], place, folder="text_encoder", **weights)
    except (KeyError, AttributeError, OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(config, error) from error
    return tokenizer, encoder.eval()


def _variant_of(place: str, variant: str | None) -> str | None:
    """The variant, unless the encoder in that folder has the usual weights only."""
    folder = Path(place, "text_encoder")
    return None if folder.is_dir() and variant not in variants_of(folder) else variant


def _load(name: str, place: str, *, folder: str, **options: Any) -> Any:
    return getattr(transformers, name).from_pretrained(place, subfolder=folder, **options)
