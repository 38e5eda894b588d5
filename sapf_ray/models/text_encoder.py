"""A text-to-image model's text encoder by itself: a fraction of the model's weights.

>>> states, cut = text_states("glyphs-tiny", ["An image of the digit three", "very " * 20])
>>> states.shape, cut
(torch.Size([2, 16, 64]), [False, True])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from sapf_ray.models.families import read_index, unreadable
from sapf_ray.models.location import resolve_model


@torch.no_grad()
def text_states(path: str, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
    """States of prompts as the denoiser is given them, on the CPU.

    Args:
        path: Bundled or catalog name, directory or hub id of a text-to-image model.
        prompts: n prompts.

    Returns:
        float32 (n, L, d), and whether each prompt is cut off at L tokens.

    Raises:
        DataError: The model cannot be found or read.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    index, _ = read_index(path)
    place = resolve_model(path)
    try:
        tokenizer = _load(index["tokenizer"][1], place, folder="tokenizer")
        encoder = _load(index["text_encoder"][1], place, folder="text_encoder").eval()
    except (KeyError, AttributeError, OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(path, error) from error
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


def _load(name: str, place: str, *, folder: str) -> Any:
    return getattr(transformers, name).from_pretrained(place, subfolder=folder)
