"""The picture at the head of README: real digits beside what runs made of the public model.

    python -m jobs.readme_figure "{'public model, not fine-tuned': runs/public, 'DP-SAPF, ε = 10':
    runs/digits}"

Shows real images, which a run itself never does: scikit-learn's digits are public.
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.pictures import class_rows, save_grid
from sapf_ray.synthesis.writer import read_synthetic


def main(
    runs: dict[str, str],
    out: str = "docs/digits.png",
    *,
    source: str = "digits",
    per_class: int = 10,
) -> None:
    """Draws one panel per run after the panel of real test images.

    Args:
        runs: Panel title to run directory.
        out: PNG file.
        source: Data source of the real images.
        per_class: Images per class, the first ones; nothing is picked by hand.
    """
    real = open_source(DataConfig(source=source))
    n_classes = len(real.class_names)
    images, labels = real.read("test", np.arange(real.n_test), resolution=32)
    panels = {
        "real (test set)": class_rows(images, labels, n_classes=n_classes, per_class=per_class)
    }
    for title, directory in runs.items():
        panels[title] = class_rows(
            *read_synthetic(Path(directory) / "synthetic"), n_classes=n_classes, per_class=per_class
        )
    print(save_grid(panels, Path(out), row_names=real.class_names))


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
