"""scikit-learn's digits as Parquet files with a column of made-up writers, k images each.

    python -m jobs.made_up_writers --k 5 --out data/writers-5
    sapf run --data.source=parquet --data.path=data/writers-5 --data.groups=column:writer \\
        --data.prompt_template='An image of the digit {name}' …

The images, classes and split are those of ``data.source: digits``; whose they are is made up. A
writer is ``mixed`` (any digits) or ``pure`` (one digit only, as a patient has one disease); the
last one of each kind has fewer where their number is no multiple of k.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, open_source

SIDE = 32  # pixels


def writers(labels: np.ndarray, k: int, *, pure: bool, seed: int) -> np.ndarray:
    """Number of each image's writer, int64 (n,).

    Args:
        labels: (n,) classes.
        k: Images a writer.
        pure: Whether a writer writes one class only.
        seed: Who writes what.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if not pure:
        found = np.empty(len(labels), np.int64)
        found[order] = np.arange(len(labels)) // k
        return found
    found = np.empty(len(labels), np.int64)
    first = 0
    for label in np.unique(labels):
        own = order[labels[order] == label]
        found[own] = first + np.arange(len(own)) // k
        first = int(found[own].max()) + 1
    return found


def write_split(source: ImageSource, split: Split, path: Path, *, owner: np.ndarray) -> None:
    """Writes one Parquet file as Hugging Face ``datasets`` would, with the column ``writer``."""
    images, labels = source.read(split, np.arange(len(owner)), resolution=SIDE)
    cells = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": f"{split}-{number}.png"})
    names = list(source.class_names)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": cells, "label": labels, "writer": owner})
    info = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--k", type=int, required=True, help="images a writer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--pure", action="store_true", help="a writer writes one digit only")
    parser.add_argument("--seed", type=int, default=0, help="who writes what")
    given = parser.parse_args()
    source = open_source(DataConfig(source="digits"))
    given.out.mkdir(parents=True, exist_ok=True)
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        owner = writers(source.labels(split), given.k, pure=given.pure, seed=given.seed)
        write_split(source, split, given.out / f"{split}.parquet", owner=owner)


if __name__ == "__main__":
    main()
