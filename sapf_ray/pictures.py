"""Picture grids: one row per class. Real images never appear unless the caller asks for a research
figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from sapf_ray.runs import worktime
from sapf_ray.synthesis.writer import synthetic_parts

ROW_INCHES = 0.42  # height of a row of images in a figure


def class_rows(
    images: np.ndarray, labels: np.ndarray, *, n_classes: int, per_class: int
) -> np.ndarray:
    """The first images of each class as one picture, one row a class.

    Args:
        images: uint8 (n, R, R, 3).
        labels: int64 (n,).
        n_classes: Number of rows.
        per_class: Number of images in a row; what a class lacks stays black.

    Returns:
        uint8 (n_classes * R, per_class * R, 3).
    """
    side = images.shape[1]
    canvas = np.zeros((n_classes, side, per_class, side, 3), np.uint8)
    for label in range(n_classes):
        for column, image in enumerate(images[labels == label][:per_class]):
            canvas[label, :, column] = image
    return canvas.reshape(n_classes * side, per_class * side, 3)


def save_grid(
    panels: dict[str, np.ndarray], path: Path, *, row_names: tuple[str, ...], title: str = ""
) -> Path:
    """Panels side by side, each a picture of :func:`class_rows`, rows named by class.

    Args:
        panels: Title to picture, all of one size.
        path: Where the file goes.
        row_names: One per class.
        title: Title of the whole figure.

    Returns:
        The path.
    """
    height, width = next(iter(panels.values())).shape[:2]
    rows = len(row_names)
    inches = ROW_INCHES * rows / height  # of a pixel
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(width * inches * len(panels) + 1, height * inches + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, picture) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    middles = (np.arange(rows) + 0.5) * height / rows
    axes[0][0].set_yticks(middles, row_names, fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes the picture, its folder where there is none, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


@worktime.working()
def save_sample_grid(
    synthetic: Path, class_names: tuple[str, ...], *, path: Path, per_class: int = 10
) -> Path:
    """A grid of synthetic images only: safe to log anywhere the data set itself may go."""
    n_classes = len(class_names)
    images, labels = _first(synthetic_parts(synthetic), n_classes=n_classes, per_class=per_class)
    picture = class_rows(images, labels, n_classes=n_classes, per_class=per_class)
    return save_grid({"synthetic": picture}, path, row_names=class_names)


def _first(
    parts: Iterator[tuple[np.ndarray, np.ndarray]], *, n_classes: int, per_class: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class, in order; reads on only until there are enough."""
    chosen = []
    wanted = np.full(n_classes, per_class)
    for images, labels in parts:
        for image, label in zip(images, labels.tolist(), strict=True):
            if wanted[label]:
                wanted[label] -= 1
                chosen.append((image, label))
        if not wanted.any():
            break
    return np.stack([image for image, _ in chosen]), np.array([label for _, label in chosen])
