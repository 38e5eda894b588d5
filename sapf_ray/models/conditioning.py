"""One interface to both kinds of public model: text-to-image U-Nets and class-conditional diffusion
transformers (DiT).

A *condition* is what tells the denoiser the class of one image: text-encoder states (L, d) for a
U-Net, an int64 label id for a DiT. Stacked along the first dimension, conditions are indexed,
repeated and concatenated alike, so the cache, the loss and the sampler never ask which kind they
hold.

>>> from sapf_ray.models.loading import load_pipeline
>>> pipe = load_pipeline("glyphs-tiny")
>>> encode_conditions(pipe, ("An image of the digit three",)).shape
torch.Size([1, 16, 64])
>>> label_ids({0: "digit three, three, 3"}, 1, prompts=("An image of the digit three",))
(0,)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapf_ray.errors import ConfigError

TOKENS_MULTIPLE = 16
LISTED = 12  # labels that an error message shows


def denoiser_of(pipe: Any) -> Any:
    """The network that predicts noise: the pipeline's U-Net or transformer."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def has_labels(pipe: Any) -> bool:
    """Whether the model is conditioned on label ids rather than on text."""
    return not hasattr(pipe, "text_encoder")


@torch.no_grad()
def encode_conditions(
    pipe: Any, prompts: Sequence[str], *, class_labels: Sequence[int] | None = None
) -> Tensor:
    """The condition of each class; public.

    Args:
        prompts: One per class.
        class_labels: Label ids, one per class, of a class-conditional model; found by name in the
            prompts by default.

    Returns:
        Text-encoder states float32 (classes, L, d), or label ids int64 (classes,), on the CPU.

    Raises:
        ConfigError: No label fits, or ``class_labels`` does not fit the model.
    """
    if has_labels(pipe):
        n_labels = null_label(pipe)
        return torch.tensor(
            label_ids(pipe_labels(pipe), n_labels, prompts=prompts, class_labels=class_labels),
            dtype=torch.int64,
        )
    check_text_model(class_labels)
    tokens = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return pipe.text_encoder(tokens.input_ids.to(pipe.device))[0].float().cpu()


def null_condition(pipe: Any) -> Tensor:
    """(1, ...) what guidance subtracts: the states of the empty prompt, or the label that stands
    for none.
    """
    return torch.tensor([null_label(pipe)]) if has_labels(pipe) else encode_conditions(pipe, ("",))


def null_label(pipe: Any) -> int:
    """The id after the last label: diffusers' DiT embeds "no label" there."""
    return int(denoiser_of(pipe).config.num_embeds_ada_norm)


def pipe_labels(pipe: Any) -> dict[int, str]:
    """Id to names; several names of one label are separated by commas, as in ImageNet's list."""
    names: dict[int, list[str]] = {}
    for name, number in pipe.labels.items():
        names.setdefault(number, []).append(name)
    return {number: ", ".join(names[number]) for number in sorted(names)}


def check_text_model(class_labels: Sequence[int] | None) -> None:
    """Raises :class:`ConfigError` where label ids are given for a model that reads prompts."""
    if class_labels is not None:
        raise ConfigError(
            "model.class_labels",
            list(class_labels),
            "must be left out: this model is conditioned on prompts",
        )


def label_ids(
    id2label: Mapping[int, str],
    n_labels: int,
    *,
    prompts: Sequence[str],
    class_labels: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The label id of each class.

    By default the label whose name stands in the class's prompt as whole words, the longest name
    first; case counts unless nothing fits otherwise. Where the model knows no such name (an
    ImageNet DiT on CIFAR-10, say), the user names ids in ``model.class_labels``, as is done when a
    DiT moves to new classes: fine-tuning gives each of these label embeddings' images a new
    meaning. The id may be any; one of a similar class starts nearer.

    Args:
        id2label: Names of each id, separated by commas.
        n_labels: Number of labels; ids run from 0 to n_labels - 1.
        prompts: One per class.
        class_labels: Ids that the user named, one per class.

    Raises:
        ConfigError: A class without label, two classes with the same one, or ids that do not fit.
    """
    if class_labels is not None:
        known = all(0 <= label < n_labels for label in class_labels)
        different = len(set(class_labels)) == len(class_labels) == len(prompts)
        if not (known and different):
            raise ConfigError(
                "model.class_labels",
                list(class_labels),
                f"must be {len(prompts)} different label ids from 0 to {n_labels - 1}, "
                "one per class in the data set's order",
            )
        return tuple(int(label) for label in class_labels)
    names = [
        (name.strip(), number) for number, text in id2label.items() for name in text.split(",")
    ]
    names.sort(key=lambda entry: -len(entry[0]))
    found = [_label_in(prompt, names) for prompt in prompts]
    for prompt, label in zip(prompts, found, strict=True):
        if label is None or found.count(label) > 1:
            why = "names the same label as another class"
            if label is None:
                why = "names no label of the model"
            raise ConfigError(
                "model.class_labels",
                None,
                f"must be one label id per class, since the prompt {prompt!r} {why}; "
                f"labels: {_listed(id2label)}",
            )
    return tuple(label for label in found if label is not None)


def _listed(id2label: Mapping[int, str]) -> str:
    """The first names of the labels, for an error message."""
    names = [text.split(",")[0] for text in id2label.values()]
    if not names:
        return "without names"
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown}, ... ({len(names)} in all)"


def _label_in(prompt: str, names: list[tuple[str, int]]) -> int | None:
    for flags in (0, re.IGNORECASE):
        for name, number in names:
            if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, flags):
                return number
    return None


def to_denoiser(conditions: Tensor, device: torch.device | str, *, dtype: torch.dtype) -> Tensor:
    """Moves conditions to the denoiser; states take its precision, label ids stay integers."""
    return conditions.to(
        device, dtype if conditions.is_floating_point() else None, non_blocking=True
    )


def condition_arguments(conditions: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of the denoiser for conditions (n, ...).

    On CPU text tokens are filled up with masked zeros to a multiple of 16: attention over CLIP's 77
    takes up to twice the time of attention over 80. A masked token has weight 0 and gradient 0, so
    values and per-sample gradients stay what they are.
    """
    if not conditions.is_floating_point():
        return {"class_labels": conditions}
    missing = -conditions.shape[1] % TOKENS_MULTIPLE
    if conditions.device.type != "cpu" or missing == 0:
        return {"encoder_hidden_states": conditions}
    keep = torch.ones(conditions.shape[0], conditions.shape[1] + missing, dtype=torch.bool)
    keep[:, conditions.shape[1] :] = False
    return {
        "encoder_hidden_states": F.pad(conditions, (0, 0, 0, missing)),
        "encoder_attention_mask": keep,
    }


def predict(
    denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, arguments: Mapping[str, Tensor]
) -> Tensor:
    """What the denoiser says of noisy latents (n, C, h, w): noise, velocity or clean latents,
    float32 (n, C, h, w).

    A model with learned variances (DiT-XL/2) predicts 2C channels; its first C are the noise,
    trained by the same mean squared error (Nichol and Dhariwal 2021, L_simple of L_hybrid); the
    rest is not used and gets no gradient.

    Args:
        noisy: In the denoiser's precision.
        timesteps: (n,) or a scalar.
        arguments: From :func:`condition_arguments`.
    """
    output = denoiser(noisy, timesteps.expand(len(noisy)), **arguments, return_dict=False)[0]
    return output[:, : noisy.shape[1]].float()
