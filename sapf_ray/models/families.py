"""The kinds of public model that can be fine-tuned: one row each.

A new kind of diffusers pipeline is one more row of ``FAMILIES``, provided that its denoiser takes
the conditions that :mod:`sapf_ray.models.conditioning` knows.

Importing diffusers takes seconds, so it is imported where a class of it is needed: a model in a
folder is known by its JSON files alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sapf_ray.config import ModelConfig
from sapf_ray.errors import DataError, reason
from sapf_ray.models.hub_cache import reach_hub
from sapf_ray.models.location import as_config, resolve_model
from sapf_ray.registry import Registry


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """How a family trains and samples by flow matching.

    Attributes:
        density: Row of :data:`sapf_ray.models.processes.DENSITIES` for training's times.
        of_clean: Whether the loss is one of clean latents, as SD3's script has it by default.
        even: Whether sampling's shares of noise are evenly spaced from 1 before they are shifted,
            as FLUX's pipeline has them.
    """

    density: str = "uniform"
    of_clean: bool = False
    even: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of pipeline is read.

    Attributes:
        pipeline: Class of the whole pipeline, or its name in diffusers.
        denoiser: Class of the network that predicts noise, or its name in diffusers.
        folder: Folder of the denoiser.
        components: Folders that loading reads, the denoiser's among them.
        vae: Class of the autoencoder, or its name in diffusers.
        options: Keyword arguments of ``from_pretrained``.
        conditioning: How it is told an image's class: a row of
            :data:`sapf_ray.models.conditioning.CONDITIONINGS`.
        flow: How it is trained by flow matching; None where it is trained by diffusion.
    """

    pipeline: Any
    denoiser: Any
    folder: str
    components: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    vae: Any = "AutoencoderKL"
    conditioning: str = "text"
    flow: FlowMatching | None = None

    @property
    def conditioned_on_labels(self) -> bool:
        """Whether classes are label ids rather than prompts."""
        return self.conditioning == "labels"

    @property
    def pipeline_class(self) -> Any:
        """``pipeline``, imported."""
        return imported(self.pipeline)

    @property
    def denoiser_class(self) -> Any:
        """``denoiser``, imported."""
        return imported(self.denoiser)


_ONE_ENCODER = ("scheduler", "text_encoder", "tokenizer", "vae")
_TWO_ENCODERS = (*_ONE_ENCODER, "text_encoder_2", "tokenizer_2")

FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        "StableDiffusionPipeline": Family(
            pipeline="StableDiffusionPipeline",
            denoiser="UNet2DConditionModel",
            folder="unet",
            components=("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
            options={"safety_checker": None, "requires_safety_checker": False},
        ),
        "DiTPipeline": Family(
            pipeline="DiTPipeline",
            denoiser="DiTTransformer2DModel",
            folder="transformer",
            components=("scheduler", "transformer", "vae"),
            conditioning="labels",
        ),
        "StableDiffusionXLPipeline": Family(
            pipeline="StableDiffusionXLPipeline",
            denoiser="UNet2DConditionModel",
            folder="unet",
            components=(*_TWO_ENCODERS, "unet"),
            options={"add_watermarker": False},
            conditioning="sdxl",
        ),
        "StableDiffusion3Pipeline": Family(
            pipeline="StableDiffusion3Pipeline",
            denoiser="SD3Transformer2DModel",
            folder="transformer",
            components=(*_TWO_ENCODERS, "text_encoder_3", "tokenizer_3", "transformer"),
            conditioning="sd3",
            flow=FlowMatching(density="logit_normal", of_clean=True),
        ),
        "FluxPipeline": Family(
            pipeline="FluxPipeline",
            denoiser="FluxTransformer2DModel",
            folder="transformer",
            components=(*_TWO_ENCODERS, "transformer"),
            conditioning="flux",
            flow=FlowMatching(even=True),
        ),
        "PixArtSigmaPipeline": Family(
            pipeline="PixArtSigmaPipeline",
            denoiser="PixArtTransformer2DModel",
            folder="transformer",
            components=(*_ONE_ENCODER, "transformer"),
            conditioning="masked",
        ),
        "SanaPipeline": Family(
            pipeline="SanaPipeline",
            denoiser="SanaTransformer2DModel",
            folder="transformer",
            components=(*_ONE_ENCODER, "transformer"),
            vae="AutoencoderDC",
            conditioning="masked",
            flow=FlowMatching(),
        ),
    },
)
"""``_class_name`` of model_index.json → how such a pipeline is read."""


def family_of(pipe: Any) -> Family:
    """The family of a loaded pipeline, by the name of its class or of one that it extends.

    Raises:
        KeyError: Of none.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__ if kind.__name__ in FAMILIES]
    return FAMILIES[names[0] if names else type(pipe).__name__]


def read_index(model: ModelConfig | str) -> tuple[dict[str, Any], Family]:
    """The content of a model's model_index.json and its family.

    Args:
        model: How the user named it; a path alone means the defaults.

    Raises:
        DataError: The model cannot be found or is of another family.
    """
    config = as_config(model)
    try:
        place = resolve_model(config)
        if not Path(place).is_absolute():
            reach_hub()
        index = read_config("DiffusionPipeline", place, revision=config.revision)
    except (OSError, ValueError) as error:
        raise unreadable(config, error) from error
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise DataError(
            f"model.path = {config.path!r}: is a {name}; must be one of {', '.join(FAMILIES)}"
        )
    return index, FAMILIES[name]


def imported(kind: Any) -> Any:
    """A class, given itself or by its name in diffusers."""
    if not isinstance(kind, str):
        return kind
    import diffusers

    return getattr(diffusers, kind)


def read_config(
    kind: Any, place: str, *, folder: str = "", revision: str | None = None
) -> dict[str, Any]:
    """Content of the config file of a pipeline or of one of its parts.

    Args:
        kind: Class of it, or its name in diffusers; asked where it is not a plain file on disk.
        place: Directory or hub id of the pipeline.
        folder: Folder of the part; empty for the pipeline.
        revision: Branch, tag or commit of the hub.

    Raises:
        OSError: There is none, or it cannot be read.
    """
    file = Path(place, folder, "config.json" if folder else "model_index.json")
    if file.is_file():
        with contextlib.suppress(OSError, ValueError):  # diffusers says what is wrong
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
    return dict(imported(kind).load_config(place, subfolder=folder or None, revision=revision))


def latent_side(denoiser: Any) -> int:
    """Side of the latents that a denoiser was made for, from its config; FLUX's pipeline says 128
    where the config has none.
    """
    return int(denoiser.get("sample_size") or 128)


def latent_factor(vae: Any) -> int:
    """Pixels, each way, that one latent stands for, from the autoencoder's config."""
    levels = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
    return 2 ** (len(levels) - 1)


def image_side(denoiser: Any, vae: Any) -> int:
    """Side in pixels of a model's images, from the configs of its denoiser and its VAE."""
    return latent_side(denoiser) * latent_factor(vae)


def unreadable(model: ModelConfig | str, error: Exception) -> DataError:
    """The one-line error for a model that a library refuses."""
    config = as_config(model)
    place = resolve_model(config)
    if Path(place).is_absolute():
        return DataError(
            f"model.path = {config.path!r}: cannot be loaded as one of {', '.join(FAMILIES)} "
            f"({reason(error)})"
        )
    return DataError(
        f"model.path = {config.path!r}: there is no such folder, and as a model of the hub it "
        f"cannot be read ({reason(error)}); correct the path, or fetch it where the hub is "
        f"reached: hf download {place}"
    )
