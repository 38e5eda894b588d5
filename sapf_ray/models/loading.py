"""Loads a public diffusion pipeline: bundled, by a short name of the catalog, from a local
directory, or by hub id.

One path for all of them: the bundled models are ordinary diffusers directories.

>>> pipe = load_pipeline("glyphs-tiny")
>>> type(pipe).__name__, type(load_pipeline("glyphs-dit-tiny")).__name__
('StableDiffusionPipeline', 'DiTPipeline')
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from sapf_ray.config import ModelConfig
from sapf_ray.errors import DataError, reason
from sapf_ray.models.catalog import CATALOG
from sapf_ray.models.conditioning import check_text_model, denoiser_of, label_ids

BUNDLED_DIR = Path(__file__).parent / "bundled"

FAMILIES: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "StableDiffusionPipeline": (
        StableDiffusionPipeline,
        "unet",
        UNet2DConditionModel,
        {"safety_checker": None, "requires_safety_checker": False},
    ),
    "DiTPipeline": (DiTPipeline, "transformer", DiTTransformer2DModel, {}),
}
"""``_class_name`` of model_index.json → pipeline, its denoiser's folder and class, and what loading it needs besides."""


def bundled_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED_DIR.glob("*/model_index.json"))


def resolve_model(path: str) -> str:
    """A bundled name or local directory as an absolute path, a short name of the catalog as its hub
    id; a hub id stays.

    Raises:
        DataError: A local directory that is not a diffusers pipeline, or whose weights are
            truncated.
    """
    local = BUNDLED_DIR / path
    if not local.exists():
        local = Path(path).expanduser()
    if not local.exists():
        if path in CATALOG and CATALOG[path].hub_id:
            return CATALOG[path].hub_id
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return path
        known = [name for name, row in CATALOG.items() if row.hub_id]
        raise DataError(
            f"model.path = {path!r}: no such directory; give a diffusers directory, a hub id (owner/name), one of the bundled "
            f"models ({', '.join(bundled_models())}) or of the known ones ({', '.join(known)})"
        )
    check_pipeline_directory(local)
    return str(local.resolve())


def check_pipeline_directory(directory: Path) -> None:
    """Reads headers only, so that a broken model is found before any budget is spent."""
    index = directory / "model_index.json"
    if not index.is_file():
        raise DataError(
            f"model.path = {str(directory)!r}: no model_index.json there; expected a diffusers pipeline directory"
        )
    try:
        json.loads(index.read_text())
    except ValueError as error:
        raise DataError(f"{index}: not valid JSON ({error})") from error
    for weights in sorted(directory.glob("*/*.safetensors")):
        try:
            with safe_open(weights, framework="pt") as f:
                f.keys()
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{weights}: truncated or damaged weights ({error}); copy the file again"
            ) from error


def check_model(model: ModelConfig, prompts: Sequence[str]) -> nn.Module:
    """Checks from config files alone, no weights read, that the model is of a known family and
    knows the classes.

    Returns:
        The denoiser on the meta device: names and shapes of its weights.

    Raises:
        DataError: A model that cannot be found or is of another family.
        ConfigError: ``model.class_labels`` is needed, or does not fit.
    """
    index, (_, folder, denoiser_class, _) = _family(model.path)
    try:
        config = denoiser_class.load_config(resolve_model(model.path), subfolder=folder)
        with torch.device("meta"):
            denoiser = denoiser_class.from_config(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(model.path, error) from error
    if index["_class_name"] == "DiTPipeline":
        names = {int(number): text for number, text in (index.get("id2label") or {}).items()}
        label_ids(
            names,
            denoiser.config.num_embeds_ada_norm,
            prompts=prompts,
            class_labels=model.class_labels,
        )
    else:
        check_text_model(model.class_labels)
    return denoiser


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
    _, (pipeline_class, _, _, options) = _family(path)
    try:
        pipe = pipeline_class.from_pretrained(
            resolve_model(path), dtype=getattr(torch, dtype), **options
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    pipe.set_progress_bar_config(disable=True)
    for module in (denoiser_of(pipe), pipe.vae, getattr(pipe, "text_encoder", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return pipe.to(device)


@functools.lru_cache(maxsize=1)
def kept_pipeline(model: ModelConfig, device: str) -> Any:
    """:func:`load_pipeline`, kept by a worker process between its tasks; whoever changes it loads
    one of their own.
    """
    return load_pipeline(model.path, model.dtype, device=device)


def _family(path: str) -> tuple[dict[str, Any], tuple[Any, str, Any, dict[str, Any]]]:
    """The content of model_index.json, and the row of ``FAMILIES`` it names."""
    try:
        index = DiffusionPipeline.load_config(resolve_model(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise DataError(f"model.path = {path!r}: is a {name}; must be one of {', '.join(FAMILIES)}")
    return index, FAMILIES[name]


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(
        f"model.path = {path!r}: cannot be loaded as one of {', '.join(FAMILIES)} ({reason(error)})"
    )


def native_resolution(pipe: Any) -> int:
    """Side of the images the pipeline makes, in pixels."""
    return _side(denoiser_of(pipe).config, pipe.vae.config)


def model_resolution(path: str) -> int:
    """:func:`native_resolution` of a model from its config files alone.

    Raises:
        DataError: The model cannot be found or is of another family.
    """
    _, (_, folder, denoiser_class, _) = _family(path)
    try:
        return _side(
            *(
                kind.load_config(resolve_model(path), subfolder=part)
                for kind, part in ((denoiser_class, folder), (AutoencoderKL, "vae"))
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def _side(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    return int(denoiser["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
