"""A text-to-image model's text encoders by themselves: a fraction of the model's weights.

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
from sapf_ray.config.section import require
from sapf_ray.models.checkpoints import checkpoint_of
from sapf_ray.models.conditioning import CONDITIONINGS
from sapf_ray.models.encoders import longest_reader, prompt_limit
from sapf_ray.models.families import Family, read_index, unreadable
from sapf_ray.models.location import as_config, resolve_model
from sapf_ray.models.weight_files import variants_of

SHOWN = 60  # characters of a prompt in a message


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
    config = as_config(model)
    _, family = read_index(config)
    if family.conditioning != "text":
        return _states_of_family(config, prompts, family=family)
    tokenizer, encoder = _tokenizer_and_encoder(config)
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


def _states_of_family(
    model: ModelConfig, prompts: Sequence[str], *, family: Family
) -> tuple[Tensor, list[bool]]:
    """The same for a family with several text encoders, or with masked tokens, which count as zero:
    the pipeline without its denoiser and its autoencoder.
    """
    absent = {family.folder: None, "vae": None}
    try:
        pipe = family.pipeline_class.from_pretrained(
            resolve_model(model),
            variant=model.variant,
            revision=model.revision,
            **absent,
            **family.options,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreadable(model, error) from error
    conditions = CONDITIONINGS[family.conditioning].encode(pipe, prompts)
    states = conditions.states
    assert states is not None
    if conditions.mask is not None:
        states = states * conditions.mask.unsqueeze(-1)
    lengths, limit = prompt_lengths(model, prompts)
    return states, [length > limit for length in lengths]


def prompt_lengths(model: ModelConfig, prompts: Sequence[str]) -> tuple[list[int], int]:
    """Number of tokens of each prompt, and how many of them a text-to-image model reads.

    Where it has several text encoders, those of the one that reads furthest.

    Raises:
        DataError: The model cannot be found or read.
    """
    index, family = read_index(model)
    try:
        there = [name for name in family.components if (index.get(name) or [None])[0]]
        folder = longest_reader(there)
        tokenizer = _load(index[folder][1], resolve_model(model), folder=folder)
    except (KeyError, AttributeError, OSError, ValueError) as error:
        raise unreadable(model, error) from error
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False)["input_ids"]]
    return lengths, prompt_limit(family.pipeline_class, tokenizer)


def check_prompt_lengths(model: ModelConfig, prompts: Sequence[str]) -> None:
    """Checks that prompts are read to their end; loads a tokenizer alone.

    Raises:
        ConfigError: One is longer.
    """
    lengths, limit = prompt_lengths(model, prompts)
    for prompt, length in zip(prompts, lengths, strict=True):
        require(
            length <= limit,
            "data.prompt_template",
            prompt[:SHOWN],
            f"must make prompts of at most {limit} tokens, all that the model reads; this one has "
            f"{length}",
        )


def _load(name: str, place: str, *, folder: str, **options: Any) -> Any:
    return getattr(transformers, name).from_pretrained(place, subfolder=folder, **options)
