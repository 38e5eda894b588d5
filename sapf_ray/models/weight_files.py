"""Files of a diffusers pipeline that hold weights: names, variants, headers.

Imports no deep-learning library, and reads headers at most.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapf_ray.errors import DataError, reason

INDEX = "model_index.json"
# A sharded model has several files, 00001-of-00003 and so on; a variant (fp16, non_ema) one more
# word, which old versions of diffusers wrote behind the number.
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<new>[\w-]+?))?(-\d+-of-\d+)?"
    r"(\.(?P<old>[\w-]+))?\.(?P<kind>safetensors|bin)"
)


def networks_in(index: Mapping[str, Any]) -> list[str]:
    """Sub-folders of a pipeline that hold weights it cannot do without."""
    names = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return [name for name in names if (index.get(name) or [None])[0]]


def networks_of(index: Path) -> list[str]:
    """Sub-folders that hold weights; none where the index cannot be read."""
    try:
        return networks_in(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return []


def variants_of(folder: Path) -> set[str]:
    """Variants of a component's weights: empty for the usual ones, else fp16 and the like."""
    if not folder.is_dir():
        return set()
    found = (_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    return {match["old"] or match["new"] or "" for match in found if match}


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Files of a component's weights that loading reads, by name.

    Of a component without the variant the usual ones are read, and of both formats safetensors.

    Args:
        folder: The component's.
        variant: ``model.variant``.
    """
    wanted = variant if variant in variants_of(folder) else None
    for kind in ("safetensors", "bin"):
        found = []
        for path in folder.iterdir():
            match = _WEIGHTS.fullmatch(path.name)
            if match and match["kind"] == kind and (match["old"] or match["new"]) == wanted:
                found.append(path)
        if found:
            return sorted(found)
    return []


def read_header(weights: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors; reads no weights.

    Raises:
        DataError: Truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            return {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118  # not a mapping
            }
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{weights}: truncated or damaged weights ({reason(error)}); copy the file again"
        ) from error
