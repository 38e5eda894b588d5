"""One interface to all kinds of public model: how classes become conditions, and how a denoiser is
given them.

A *condition* is what tells the denoiser the class of one image: text-encoder states (L, d) for a
U-Net, an int64 label id for a DiT, several things together for others. They travel as
:class:`sapf_ray.models.conditions.Conditions`, so the cache, the loss and the sampler never ask
which kind they hold; :data:`CONDITIONINGS` has a row for each kind.

>>> from sapf_ray.models.loading import load_pipeline
>>> pipe = load_pipeline("glyphs-tiny")
>>> encode_conditions(pipe, ("An image of the digit three",)).states.shape
torch.Size([1, 16, 64])
>>> label_ids({0: "digit three, three, 3"}, 1, prompts=("An image of the digit three",))
(0,)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sapf_ray.errors import ConfigError, DataError
from sapf_ray.models import calls, encoders
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.families import FAMILIES, family_of
from sapf_ray.registry import Registry

LISTED = 12  # labels that an error message shows


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One kind of conditions.

    Attributes:
        encode: Pipeline and n prompts to n conditions.
        null: Pipeline to the one condition that guidance subtracts.
        call: How a denoiser is given them.
        shapes: Config of the denoiser to the shape of each part of one image's condition.
        pack: Latents, each way, that become channels of one token before the denoiser sees them.
        unlike: Config of the denoiser to why it is none of this kind; empty where it is one.
    """

    encode: Callable[[Any, Sequence[str]], Conditions]
    null: Callable[[Any], Conditions]
    call: calls.DenoiserCall
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    pack: int = 1
    unlike: Callable[[Mapping[str, Any]], str] = lambda config: ""

    def check(self, config: Mapping[str, Any], path: str) -> None:
        """Raises :class:`DataError` where a denoiser's config wants more than is handed over."""
        if why := self.unlike(config):
            raise DataError(f"model.path = {path!r}: {why}")

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C of the latents that the denoiser of that config takes."""
        return int(config["in_channels"]) // self.pack**2


def denoiser_of(pipe: Any) -> Any:
    """The network that predicts noise: the pipeline's U-Net or transformer."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def has_labels(pipe: Any) -> bool:
    """Whether the model is conditioned on label ids rather than on text."""
    return family_of(pipe).conditioned_on_labels


@torch.no_grad()
def encode_conditions(
    pipe: Any, prompts: Sequence[str], *, class_labels: Sequence[int] | None = None
) -> Conditions:
    """The condition of each class; public.

    Args:
        pipe: The public pipeline.
        prompts: One per class.
        class_labels: Label ids, one per class, of a class-conditional model; found by name in the
            prompts by default.

    Returns:
        float32 parts and int64 label ids on the CPU.

    Raises:
        ConfigError: No label fits, or ``class_labels`` does not fit the model.
    """
    family = family_of(pipe)
    if family.conditioned_on_labels:
        return _label_conditions(pipe, prompts, class_labels)
    check_text_model(class_labels)
    return CONDITIONINGS[family.conditioning].encode(pipe, prompts)


@torch.no_grad()
def null_condition(pipe: Any) -> Conditions:
    """(1, ...) what guidance subtracts: that of the empty prompt, or of the label that stands for
    none.
    """
    return CONDITIONINGS[family_of(pipe).conditioning].null(pipe)


def predict(
    denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions
) -> Tensor:
    """What the denoiser says of noisy latents (n, C, h, w): noise, velocity or clean latents,
    float32 (n, C, h, w).

    A model with learned variances (DiT-XL/2) predicts 2C channels; its first C are the noise,
    trained by the same mean squared error (Nichol and Dhariwal 2021, L_simple of L_hybrid); the
    rest is not used and gets no gradient.

    Args:
        denoiser: The network.
        noisy: In the denoiser's precision.
        timesteps: (n,) or a scalar.
        conditions: n of them, in the denoiser's precision and on its device.
    """
    call = CONDITIONINGS[conditions.kind].call
    output = call(denoiser, noisy, timesteps.expand(len(noisy)), conditions)
    return output[:, : noisy.shape[1]].float()


def kind_of_denoiser(denoiser: Any) -> str:
    """The row of :data:`CONDITIONINGS` that a network by itself takes; labels where it is of no
    family.
    """
    if getattr(denoiser.config, "addition_embed_type", None) == "text_time":
        return "sdxl"
    for family in FAMILIES.values():
        if getattr(family.denoiser, "__name__", family.denoiser) == type(denoiser).__name__:
            return family.conditioning
    return "labels"


def blank_conditions(
    kind: str, config: Mapping[str, Any], *, device: str | torch.device, tokens: int | None = None
) -> Conditions:
    """One condition of ones in the shapes that a denoiser takes, to count or to probe with.

    Args:
        kind: Row of :data:`CONDITIONINGS`.
        config: The denoiser's.
        device: Torch device; ``meta`` will do.
        tokens: Number of text tokens; as many as the stock pipeline has by default.
    """
    types = {"labels": torch.int64, "mask": torch.bool}
    parts: dict[str, Tensor] = {}
    for name, shape in CONDITIONINGS[kind].shapes(config).items():
        if tokens is not None and name in ("states", "mask"):
            shape = (tokens, *shape[1:])
        dtype = types.get(name, torch.float32)
        parts[name] = torch.ones(1, *shape, dtype=dtype, device=device)
    return Conditions(kind=kind).with_parts(**parts)


@torch.no_grad()
def _text_states(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Last states of the one text encoder, all tokens alike."""
    tokens = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    states = pipe.text_encoder(tokens.input_ids.to(pipe.device))[0]
    return Conditions(states=states.float().cpu())


def _label_conditions(
    pipe: Any, prompts: Sequence[str], class_labels: Sequence[int] | None = None
) -> Conditions:
    """Label ids that are given, or whose names stand in the prompts."""
    n_labels = null_label(pipe)
    ids = label_ids(pipe_labels(pipe), n_labels, prompts=prompts, class_labels=class_labels)
    return Conditions(kind="labels", labels=torch.tensor(ids, dtype=torch.int64))


def _sdxl_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    sizes = 6 * config["addition_time_embed_dim"]
    return {
        "states": (77, config["cross_attention_dim"]),
        "pooled": (config["projection_class_embeddings_input_dim"] - sizes,),
        "ids": (6,),
    }


def _unlike_masked(config: Mapping[str, Any]) -> str:
    if config.get("guidance_embeds"):
        return "is told a guidance scale, as Sana-Sprint; must be a Sana without"
    sized = config.get("use_additional_conditions")
    if sized or (
        sized is None and "num_embeds_ada_norm" in config and config["sample_size"] == 128
    ):
        return "is told sizes and aspect ratios, as PixArt-Alpha; must be a PixArt-Sigma"
    return ""


def _flux_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    told: dict[str, tuple[int, ...]] = {"guidance": ()} if config["guidance_embeds"] else {}
    return {
        "states": (512, config["joint_attention_dim"]),
        "pooled": (config["pooled_projection_dim"],),
        **told,
    }


CONDITIONINGS: Registry[Conditioning] = Registry(
    "conditioning",
    {
        "text": Conditioning(
            encode=_text_states,
            null=lambda pipe: _text_states(pipe, ("",)),
            call=calls.call_with_text,
            shapes=lambda config: {"states": (77, config["cross_attention_dim"])},
        ),
        "labels": Conditioning(
            encode=_label_conditions,
            null=lambda pipe: Conditions(kind="labels", labels=torch.tensor([null_label(pipe)])),
            call=calls.call_with_labels,
            shapes=lambda config: {"labels": ()},
        ),
        "sdxl": Conditioning(
            encode=encoders.encode_sdxl,
            null=encoders.null_sdxl,
            call=calls.call_sdxl,
            shapes=_sdxl_shapes,
        ),
        "sd3": Conditioning(
            encode=encoders.encode_sd3,
            null=encoders.null_sd3,
            call=calls.call_sd3,
            shapes=lambda config: {
                "states": (77 + 256, config["joint_attention_dim"]),
                "pooled": (config["pooled_projection_dim"],),
            },
        ),
        "flux": Conditioning(
            encode=encoders.encode_flux,
            null=encoders.null_flux,
            call=calls.call_flux,
            shapes=_flux_shapes,
            pack=2,
        ),
        "masked": Conditioning(
            encode=encoders.encode_masked,
            null=encoders.null_masked,
            call=calls.call_masked,
            shapes=lambda config: {"states": (300, config["caption_channels"]), "mask": (300,)},
            unlike=_unlike_masked,
        ),
    },
)
"""Name of a kind, as a family has it, to what it does."""


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
