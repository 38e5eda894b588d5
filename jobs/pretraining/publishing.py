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
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def card(
    title: str,
    about: str,
    *,
    command: str,
    facts: dict[str, object],
) -> str:
    """The model card, as Markdown."""
    lines = [
        f"# {title}",
        "",
        about,
        "",
        "Made by",
        "",
        f"    {command}",
        "",
        "in the repository root; the same command trains it again; equality to the last bit is "
        "not promised.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


def save_pipeline(
    pipe: Any,
    directory: Path,
    *,
    shared: tuple[str, ...] = (),
    donor: str = "",
) -> None:
    """Writes fp16 weights; a stock ``from_pretrained`` brings them up as float32.

    Args:
        pipe: The pipeline.
        directory: Where it is written.
        shared: Parts that are those of ``donor``: their files become links, so that the package
            holds them once.
        donor: Name of a directory beside this one.
    """
    half = copy.deepcopy(pipe).to(dtype=torch.float16)
    half.save_pretrained(directory)
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
    """Writes the classifier's fp16 weights."""
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, directory / WEIGHTS_NAME)


def publish(
    save: Callable[[Path], None],
    directory: Path,
    *,
    readme: str,
) -> None:
    """Puts a complete model in place of an older one, never a half-written one."""
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save(fresh)
    (fresh / "README.md").write_text(readme)
    for path in fresh.rglob("*.safetensors"):
        if not path.is_symlink():
            path.chmod(0o644)  # safetensors writes 0600; these are public
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)
