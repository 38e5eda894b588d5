"""Prompts to conditions, by each family's own text encoders and exactly as its stock pipeline does.

Lengths and instructions are the defaults of the pipeline's own call. Captions are not cleaned as
PixArt's and Sana's calls can clean them: what comes out would depend on which packages are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sapf_ray.models.conditions import Conditions
from sapf_ray.models.families import image_side

Prompts = Sequence[str]


def call_default(pipeline: type, name: str) -> Any:
    """Default of an argument of a pipeline's call; None where it has no such argument."""
    found = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if found is None else found.default


def longest_reader(names: Iterable[str]) -> str:
    """Of a pipeline's tokenizers that of the encoder that reads furthest: diffusers has T5 last."""
    return max(name for name in names if name.startswith("tokenizer"))


def prompt_limit(pipeline: type, tokenizer: Any) -> int:
    """Number of tokens that the encoder which reads furthest is given of a prompt."""
    return call_default(pipeline, "max_sequence_length") or tokenizer.model_max_length


def encode_sdxl(pipe: Any, prompts: Prompts) -> Conditions:
    """Penultimate states of both CLIP encoders side by side, and the second's pooled vector."""
    found = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return _with_sizes(pipe, states=found[0], pooled=found[2])


def null_sdxl(pipe: Any) -> Conditions:
    """Zeros where the pipeline is configured so, else the empty prompt."""
    found = pipe.encode_prompt([""])
    return _with_sizes(pipe, states=found[1], pooled=found[3])


def _with_sizes(pipe: Any, *, states: Tensor, pooled: Tensor) -> Conditions:
    """Size ids of uncropped square images of the pipeline's own size: the same for all records,
    whose own sizes are not read.
    """
    side = image_side(pipe.unet.config, pipe.vae.config) if pipe.unet is not None else 0
    conditions = _kept("sdxl", states=states, pooled=pooled)
    return conditions.with_parts(ids=size_ids(len(conditions), side))


def size_ids(n: int, side: int) -> Tensor:
    """(n, 6) of SDXL: original height and width, crop's top and left, target height and width."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(n, 1)


def encode_sd3(pipe: Any, prompts: Prompts) -> Conditions:
    """States of both CLIP encoders, then T5's; pooled vectors of both CLIP encoders."""
    found = _sd3(pipe, prompts, negative=False)
    return _kept("sd3", states=found[0], pooled=found[2])


def null_sd3(pipe: Any) -> Conditions:
    """The empty prompt."""
    found = _sd3(pipe, [""], negative=True)
    return _kept("sd3", states=found[1], pooled=found[3])


def _sd3(pipe: Any, prompts: Prompts, *, negative: bool) -> tuple[Tensor, ...]:
    return pipe.encode_prompt(
        list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=negative,
        max_sequence_length=call_default(type(pipe), "max_sequence_length"),
    )


def encode_flux(pipe: Any, prompts: Prompts) -> Conditions:
    """T5's states and CLIP's pooled vector; the guidance that a distilled model is told, as the
    stock pipeline and diffusers' training scripts have it, unless sampling says another.
    """
    length = call_default(type(pipe), "max_sequence_length")
    states, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
    conditions = _kept("flux", states=states, pooled=pooled)
    if pipe.transformer is None or not pipe.transformer.config.guidance_embeds:
        return conditions
    told = torch.full((len(conditions),), float(call_default(type(pipe), "guidance_scale")))
    return conditions.with_parts(guidance=told)


def null_flux(pipe: Any) -> Conditions:
    """The empty prompt, for a model without distilled guidance."""
    return encode_flux(pipe, [""])


def encode_masked(pipe: Any, prompts: Prompts) -> Conditions:
    """PixArt's and Sana's: states of one encoder, and which of them are of the prompt."""
    found = _masked(pipe, prompts, negative=False)
    return _kept("masked", states=found[0], mask=found[1])


def null_masked(pipe: Any) -> Conditions:
    """The empty prompt, without Sana's instruction, as its pipeline has it."""
    found = _masked(pipe, [""], negative=True)
    return _kept("masked", states=found[2], mask=found[3])


def _masked(pipe: Any, prompts: Prompts, *, negative: bool) -> tuple[Tensor, ...]:
    names = ("max_sequence_length", "complex_human_instruction")
    options = {name: call_default(type(pipe), name) for name in names}
    given = {name: value for name, value in options.items() if value is not None}
    return pipe.encode_prompt(list(prompts), do_classifier_free_guidance=negative, **given)


def _kept(
    kind: str, *, states: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None
) -> Conditions:
    """On the CPU, floats as float32."""
    return Conditions(
        kind=kind,
        states=states.float().cpu(),
        pooled=None if pooled is None else pooled.float().cpu(),
        mask=None if mask is None else mask.bool().cpu(),
    )
