"""Single-file checkpoints: all weights of a Stable Diffusion in one ``.safetensors`` file.

Such a file has neither configs nor a tokenizer. They come from a diffusers pipeline of the same
architecture: ``model.configs``, or, for Stable Diffusion 1, the copy in the hub's cache.
"""

from __future__ import annotations

from pathlib import Path

from sapf_ray.config import ModelConfig
from sapf_ray.config.section import require
from sapf_ray.errors import DataError
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.hub_cache import cached_snapshots
from sapf_ray.models.weight_files import INDEX, read_header

SUFFIX = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth")
UNET = "model.diffusion_model."
_PARTS = {
    "U-Net": (UNET,),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner."),
}
"""Part → beginnings of its tensors' names."""

_SD1 = "sd-v1-5"
_SD1_STATES = 768  # width of the text states


def checkpoint_of(config: ModelConfig) -> Path | None:
    """The file that ``model.path`` names, where it is a single-file checkpoint.

    Raises:
        DataError: There is no such file, or it is a pickle.
    """
    path = Path(config.path).expanduser()
    if path.suffix in PICKLED and path.is_file():
        raise DataError(
            f"model.path = {config.path!r}: is a pickle, which can run code when it is read; "
            f"convert it to {SUFFIX}"
        )
    if path.suffix != SUFFIX or path.is_dir():
        return None
    if not path.is_file():
        raise DataError(f"model.path = {config.path!r}: no such file")
    return path.resolve()


def checkpoint_configs(checkpoint: Path, config: ModelConfig) -> Path:
    """The folder of configs and tokenizer that a checkpoint goes with; reads headers alone.

    Args:
        checkpoint: The file.
        config: How the user named it.

    Raises:
        DataError: The file is damaged or lacks a part of the model.
        ConfigError: ``model.configs`` is needed or is no pipeline; a key that is of no use here.
    """
    for key in ("variant", "revision"):
        value = getattr(config, key)
        require(value is None, f"model.{key}", value, "must be left out for a single file")
    header = read_header(checkpoint)
    for part, beginnings in _PARTS.items():
        if not any(name.startswith(beginnings) for name in header):
            first = next(iter(sorted(header)), "none")
            raise DataError(
                f"model.path = {config.path!r}: holds no {part} ({beginnings[0]}… is in no "
                f"tensor's name; its first is {first}); a whole checkpoint is needed"
            )
    if config.configs is not None:
        folder = Path(config.configs).expanduser()
        allowed = f"must be a folder of a diffusers pipeline: no {INDEX} there"
        require((folder / INDEX).is_file(), "model.configs", config.configs, allowed)
        return folder.resolve()
    cached = cached_snapshots(PUBLIC_MODELS[_SD1].hub_id) if _is_sd1(header) else []
    require(
        bool(cached),
        "model.configs",
        None,
        "must name a folder with the configs and the tokenizer of a diffusers pipeline of this "
        "architecture: a single file has none (weights are not needed there)",
    )
    return cached[0]


def _is_sd1(header: dict[str, tuple[int, ...]]) -> bool:
    """Whether attention reads the states of Stable Diffusion 1's text encoder; that of 2 may
    predict noise or velocity, which no header tells.
    """
    keys = [name for name in header if name.startswith(UNET) and "attn2.to_k.weight" in name]
    return bool(keys) and {header[name][-1] for name in keys} == {_SD1_STATES}
