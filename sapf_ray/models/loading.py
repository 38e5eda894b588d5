"""Loads a public diffusion pipeline: bundled, from a local diffusers directory, or by hub id.

One path for all of them: the bundled ``glyphs-tiny`` is an ordinary diffusers directory.

>>> pipe = load_pipeline("glyphs-tiny")
>>> type(pipe).__name__
'StableDiffusionPipeline'
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open

from sapf_ray.errors import ClusterError, DataError

BUNDLED_DIR = Path(__file__).parent / "bundled"


def bundled_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED_DIR.glob("*/model_index.json"))


def resolve_model(path: str) -> str:
    """A bundled name or local directory as an absolute path; anything else is left as a hub id.

    Raises:
        DataError: A local directory that is not a diffusers pipeline, or whose weights are truncated.
    """
    local = BUNDLED_DIR / path
    if not local.exists():
        local = Path(path).expanduser()
    if not local.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return path
        raise DataError(
            f"model.path = {path!r}: no such directory; give a diffusers directory, a hub id (owner/name) "
            f"or one of the bundled models: {', '.join(bundled_models())}"
        )
    check_pipeline_directory(local)
    return str(local.resolve())


def check_pipeline_directory(directory: Path) -> None:
    """Reads headers only, so that a broken model is found before any budget is spent."""
    index = directory / "model_index.json"
    if not index.is_file():
        raise DataError(f"model.path = {str(directory)!r}: no model_index.json there; expected a diffusers pipeline directory")
    try:
        json.loads(index.read_text())
    except ValueError as error:
        raise DataError(f"{index}: not valid JSON ({error})") from error
    for weights in sorted(directory.glob("*/*.safetensors")):
        try:
            with safe_open(weights, framework="pt") as f:
                f.keys()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{weights}: truncated or damaged weights ({error}); copy the file again") from error


def load_pipeline(path: str, dtype: str = "float32", device: str = "cpu") -> StableDiffusionPipeline:
    """The public pipeline, in evaluation mode, all weights frozen.

    Args:
        path: Bundled name, directory or hub id.
        dtype: ``float32`` or ``bfloat16``.
        device: Torch device string.

    Raises:
        DataError: The model cannot be found or read.
    """
    resolved = resolve_model(path)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            resolved, dtype=getattr(torch, dtype), safety_checker=None, requires_safety_checker=False,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"model.path = {path!r}: cannot be loaded as a Stable Diffusion pipeline ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    return pipe.to(device)


def native_resolution(pipe: StableDiffusionPipeline) -> int:
    """Side of the images the pipeline makes, in pixels."""
    return int(pipe.unet.config.sample_size) * int(pipe.vae_scale_factor)


def pick_device(gpus: float) -> str:
    """``cuda`` where a worker was given a GPU, else ``cpu``.

    Raises:
        ClusterError: A GPU was asked for and this machine shows none.
    """
    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ClusterError(f"{gpus} GPUs were asked for, but torch sees no CUDA device on this node")
    return "cuda"
