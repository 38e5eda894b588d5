"""Model cards and files of the bundled public models."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sapf_ray.models.glyph_features import WEIGHTS_NAME, GlyphFeatures


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def card(title: str, about: str, command: str, facts: dict[str, object]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"# {title}\n\n{about}\n\nMade by\n\n    {command}\n\nin the repository root; "
        f"the same command trains it again; equality to the last bit is not promised.\n\n| | |\n|---|---|\n{rows}\n"
    )


def save_pipeline(
    pipe: Any, directory: Path, shared: tuple[str, ...] = (), donor: str = ""
) -> None:
    """Writes fp16 weights; a stock ``from_pretrained`` brings them up as float32.

    Args:
        shared: Parts that are those of ``donor``, a directory beside this one: their files become
            links, so that the package holds them once.
    """
    copy.deepcopy(pipe).to(dtype=torch.float16).save_pretrained(directory)
    for part in shared:
        for path in sorted((directory / part).iterdir()):
            path.unlink()
            path.symlink_to(Path("..", "..", donor, part, path.name))
    # transformers 5 loads a model in the type its config names, diffusers in float32: agree.
    config = directory / "text_encoder" / "config.json"
    if config.exists() and "text_encoder" not in shared:
        text_config = json.loads(config.read_text())
        text_config["dtype"] = "float32"
        config.write_text(json.dumps(text_config, indent=2, sort_keys=True) + "\n")


def save_features(net: GlyphFeatures, directory: Path) -> None:
    save_file(
        {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()},
        directory / WEIGHTS_NAME,
    )


def publish(save: Callable[[Path], None], directory: Path, readme: str) -> None:
    """Puts a complete model in place of an older one, never a half-written one."""
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save(fresh)
    (fresh / "README.md").write_text(readme)
    for path in (p for p in fresh.rglob("*.safetensors") if not p.is_symlink()):
        path.chmod(0o644)  # safetensors writes 0600; these are public
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)
