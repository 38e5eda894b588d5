"""Which attention matrices were kept, in the notation of the paper's Table 7.

That is a block and letters of q, k, v, o. ``D1-A0`` is attention 0 of down block 1 of a U-Net,
``M`` the middle block, ``U`` an up block; a transformer's blocks are ``T0``, ``T1``, ...

>>> block_rows(["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"])
{'M-A0': {'attn2': 'v'}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from sapf_ray.pictures import save_figure

LAYERS = ("attn1", "attn2")
LETTERS = "qkvo"

_UNET = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\."
    r".*?(?:(attn[12])\.)?to_(q|k|v|out)\b"
)
_TRANSFORMER = re.compile(r"transformer_blocks\.(\d+)\.(attn[12])\.to_(q|k|v|out)\b")
_SIDES = {"down": "D", "up": "U"}


def place(name: str) -> tuple[str, str, str] | None:
    """(block, attn1 or attn2, letter) of an attention matrix; None for any other."""
    unet = _UNET.match(name)
    if unet:
        side, index, attention, layer, projection = unet.groups()
        block = f"{_SIDES[side]}{index}" if side else "M"
        return f"{block}-A{attention}", layer or "attn1", projection[0]
    transformer = _TRANSFORMER.match(name)
    if transformer:
        index, layer, projection = transformer.groups()
        return f"T{index}", layer, projection[0]
    return None


def block_rows(matrices: Iterable[str]) -> dict[str, dict[str, str]]:
    """Block to layer to the letters of its kept matrices, in alphabetical order as the paper's."""
    found: dict[str, dict[str, str]] = {}
    for name in matrices:
        where = place(name)
        if where is None:
            continue
        block, layer, letter = where
        layers = found.setdefault(block, {})
        letters = layers.get(layer, "") + letter
        layers[layer] = "".join(sorted(letters))
    return found


def save_matrix_map(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
) -> Path:
    """Heat map: the smallest ratio at which each matrix is kept, ours beside the paper's.

    White is never.

    Args:
        rows: Rows with the keys ratio, block, attn1, attn2, paper_attn1, paper_attn2.
        path: The picture.
        title: Its title.
    """
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    labels = [f"{layer} {letter}" for layer in LAYERS for letter in LETTERS]
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(9, 0.28 * len(blocks) + 1.8),
        squeeze=False,
        layout="constrained",
        sharey=True,
    )
    figure.suptitle(title, fontsize=10)
    for axis, prefix, name in ((axes[0][0], "", "ours"), (axes[0][1], "paper_", "paper")):
        first = _smallest_ratios(rows, blocks, prefix=prefix)
        picture = axis.imshow(
            first,
            cmap="viridis",
            vmin=0,
            vmax=1,
            aspect="auto",
        )
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(labels)), labels, rotation=60, fontsize=7)
        axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    figure.colorbar(picture, ax=axes, label="smallest ratio at which the matrix is kept")
    return save_figure(figure, path)


def _smallest_ratios(
    rows: Sequence[Mapping[str, Any]],
    blocks: list[str],
    *,
    prefix: str,
) -> np.ndarray:
    """(blocks, layers x letters): the smallest ratio at which each matrix is kept, else NaN."""
    columns = [(layer, letter) for layer in LAYERS for letter in LETTERS]
    first = np.full((len(blocks), len(columns)), np.nan)
    for row in rows:
        block = blocks.index(row["block"])
        for column, (layer, letter) in enumerate(columns):
            letters = row.get(prefix + layer) or ""
            if letter in letters:
                first[block, column] = np.fmin(first[block, column], row["ratio"])
    return first
