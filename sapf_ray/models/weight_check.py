"""Whether a model's files hold its denoiser, by headers: diffusers would fill what is missing with
random numbers, and say so in a log at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sapf_ray.errors import DataError
from sapf_ray.models.checkpoints import UNET, checkpoint_of
from sapf_ray.models.weight_files import read_header, weight_files

if TYPE_CHECKING:
    from sapf_ray.models.public_model import PublicModel

Shapes = Mapping[str, tuple[int, ...]]


def check_denoiser_weights(model: PublicModel) -> None:
    """Compares names and shapes in the files with those of the empty network; reads no weights.

    Pickled weights (``.bin``) have no header and are not looked at.

    Args:
        model: On this machine.

    Raises:
        DataError: Tensors are missing or have another shape.
    """
    checkpoint = checkpoint_of(model.config)
    if checkpoint is None:
        folder = Path(model.path, model.family.folder)
        files = weight_files(folder, model.config.variant)
        if not all(path.suffix == ".safetensors" for path in files):
            return
        there: dict[str, tuple[int, ...]] = {}
        for path in files:
            there |= read_header(path)
        where = f"{folder.name}/"
    else:
        there = _converted(read_header(checkpoint), model.denoiser_config)
        where = checkpoint.name
    needed = {name: tuple(value.shape) for name, value in model.denoiser.state_dict().items()}
    wrong = [name for name, shape in needed.items() if there.get(name) != shape]
    if wrong:
        first = wrong[0]
        found = f"has shape {there[first]}" if first in there else "is missing"
        raise DataError(
            f"model.path = {model.config.path!r}: {where} does not hold the network of its config: "
            f"{len(wrong)} of {len(needed)} tensors differ; {first} must have shape "
            f"{needed[first]}, and {found}"
        )


def _converted(header: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a single file's U-Net under diffusers' names, as loading converts them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = {
        name: torch.empty(shape, device="meta")
        for name, shape in header.items()
        if name.startswith(UNET)
    }
    try:
        converted = convert_ldm_unet_checkpoint(unet, dict(config))
    except (KeyError, IndexError, AttributeError):  # blocks that the config has and the file not
        return {}
    return {name: tuple(value.shape) for name, value in converted.items()}
