"""The synthetic data set on disk: Parquet shards, a manifest and a dataset card.

The schema carries the features of Hugging Face ``datasets``, so ``load_dataset(directory)`` shows
images and class names; ``pyarrow`` alone reads it just as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sapf_ray.errors import DataError, reason
from sapf_ray.files import write_atomic, write_json
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.sampling_plan import SamplingPlan, Shard

MANIFEST = "manifest.json"
CARD = "README.md"
DECODERS = min(8, os.cpu_count() or 1)  # threads that unpack PNG files
_SPEC_KEY = "sapf_ray.spec"
_SHARD_NAME = re.compile(r"train-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The images of a shard, where they were chosen among candidates.

    Attributes:
        labels: int64 (n,).
        requested: int64 (n,), class of the prompt that each was made from.
        seeds: int64 (n,).
        sources: (n,) what the label comes from: ``prompt`` or ``head``.
    """

    labels: np.ndarray
    requested: np.ndarray
    seeds: np.ndarray
    sources: Sequence[str]


def schema(class_names: Sequence[str], spec: str, *, with_sources: bool = False) -> pa.Schema:
    """Columns of a shard: image {bytes: PNG, path}, label, prompt, seed.

    Args:
        class_names: One per class.
        spec: Hex digest that says to which data set a shard belongs.
        with_sources: Whether a column ``label_source`` says where labels come from.
    """
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "prompt": {"dtype": "string", "_type": "Value"},
        "seed": {"dtype": "int64", "_type": "Value"},
    }
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
    ]
    if with_sources:
        features["label_source"] = {"dtype": "string", "_type": "Value"}
        columns.append(("label_source", pa.string()))
    return pa.schema(
        columns,
        metadata={"huggingface": json.dumps({"info": {"features": features}}), _SPEC_KEY: spec},
    )


def write_shard(
    directory: Path,
    plan: SamplingPlan,
    *,
    shard: Shard,
    images: np.ndarray | Sequence[bytes],
    class_names: Sequence[str],
    prompts: Sequence[str],
    spec: str,
    chosen: Rows | None = None,
) -> None:
    """Writes one shard so that it is either whole or not there.

    Args:
        directory: Folder of the data set.
        plan: The whole data set.
        shard: Which part of it.
        images: uint8 (rows, R, R, 3), or the rows as PNG bytes (:func:`encode_png`).
        class_names: One per class.
        prompts: One per class.
        spec: Hex digest over all that decides which images come out.
        chosen: Labels and seeds of the rows, where they are not as planned.
    """
    labels = plan.labels(shard) if chosen is None else chosen.labels
    requested = labels if chosen is None else chosen.requested
    encoded = encode_png(images) if isinstance(images, np.ndarray) else images
    rows: dict[str, Any] = {
        "image": [
            {"bytes": image, "path": f"{index:08d}.png"}
            for index, image in enumerate(encoded, start=shard.start)
        ],
        "label": labels,
        "prompt": [prompts[label] for label in requested],
        "seed": plan.seeds(shard) if chosen is None else chosen.seeds,
    }
    if chosen is not None:
        rows["label_source"] = list(chosen.sources)
    columns = schema(class_names, spec, with_sources=chosen is not None)
    write_table(pa.table(rows, schema=columns), directory / shard.file)


def note_made(directory: Path, shard: Shard, made: int) -> None:
    """Tells the driver how many images of an unfinished shard are made; 0 takes the note back."""
    note = directory / f".{shard.file}.made.partial"
    if made:
        note.write_text(str(made), encoding="utf-8")
    else:
        note.unlink(missing_ok=True)


def noted(directory: Path) -> int:
    """Images made of all unfinished shards, as far as they are noted."""
    made = 0
    for note in directory.glob(".*.made.partial"):
        with contextlib.suppress(OSError, ValueError):  # taken back, or being written
            made += int(note.read_text(encoding="utf-8"))
    return made


def is_complete(directory: Path, plan: SamplingPlan, *, shard: Shard, spec: str) -> bool:
    """Whether the shard's file is readable, belongs to ``spec`` and holds just the images planned
    for it.
    """
    try:
        file = pq.ParquetFile(directory / shard.file)
        if (file.schema_arrow.metadata or {}).get(_SPEC_KEY.encode()) != spec.encode():
            return False
        seeds = file.read(["seed"]).column("seed").to_numpy()
        if plan.oversample == 1:
            return np.array_equal(seeds, plan.seeds(shard))
        return len(seeds) == shard.rows and set(seeds) <= set(plan.candidate_seeds(shard))
    except (OSError, pa.ArrowException, KeyError):
        return False


def remove_foreign(directory: Path, plan: SamplingPlan, *, spec: str) -> None:
    """Removes shards of another layout or data set, and what an interrupted write left behind.

    Else a reader of the directory would see images of two data sets.
    """
    planned = {shard.file for shard in plan.shards}
    for path in directory.iterdir():
        partial = path.name.startswith(".") and path.name.endswith(".partial")
        if partial or (_SHARD_NAME.fullmatch(path.name) and path.name not in planned):
            path.unlink()
    manifest = directory / MANIFEST
    if manifest.exists() and _read_json(manifest).get("spec") != spec:
        manifest.unlink()


def write_manifest(
    directory: Path,
    plan: SamplingPlan,
    *,
    class_names: Sequence[str],
    prompts: Sequence[str],
    spec: str,
    privacy_note: PrivacyNote,
    label_note: str | None = None,
) -> dict[str, Any]:
    """Writes the manifest and the dataset card.

    Args:
        directory: Folder of the data set.
        plan: The whole data set.
        class_names: One per class.
        prompts: One per class.
        spec: Hex digest over all that decides which images come out.
        privacy_note: For the dataset card.
        label_note: Where labels come from, for the dataset card, where it is not from the prompts;
            they are then counted in the shards.

    Returns:
        The manifest as written.
    """
    counts = plan.class_counts
    if label_note is not None:
        counts = np.bincount(_labels(directory, plan), minlength=plan.n_classes).tolist()
    manifest = {
        "n_images": plan.n_images,
        "class_names": list(class_names),
        "prompts": list(prompts),
        "class_counts": counts,
        "class_weights": list(plan.weights) or None,
        "seed": plan.seed,
        "spec": spec,
        "shards": [{"file": s.file, "first_image": s.start, "rows": s.rows} for s in plan.shards],
    }
    write_atomic(directory / CARD, _card(manifest, privacy_note, label_note))
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a finished data set.

    Raises:
        DataError: There is none, so the data set is missing or unfinished.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise DataError(f"{path}: no such file; the synthetic data set is missing or not finished")
    return _read_json(path)


def read_synthetic(directory: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """A finished data set: images uint8 (n, R, R, 3) and labels int64 (n,), in order.

    Raises:
        DataError: As :func:`synthetic_parts`.
    """
    images, labels = zip(*synthetic_parts(directory), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def synthetic_parts(
    directory: Path | str, *, rows: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A finished data set in order, a part at a time.

    Args:
        directory: Folder of the data set.
        rows: Most images of a part.

    Yields:
        Images uint8 (k, R, R, 3) and labels int64 (k,).

    Raises:
        DataError: Missing, unfinished or damaged; names the file.
    """
    with ThreadPoolExecutor(DECODERS) as pool:
        for shard in read_manifest(directory)["shards"]:
            path = Path(directory) / shard["file"]
            try:
                with pq.ParquetFile(path) as file:
                    for part in file.iter_batches(rows, columns=["image", "label"]):
                        records = part.column("image").to_pylist()
                        images = list(pool.map(_pixels, records))
                        yield np.stack(images), part.column("label").to_numpy()
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{path}: damaged shard ({reason(error)}); repeat the command to make it again"
                ) from error


def _pixels(record: dict[str, Any]) -> np.ndarray:
    """uint8 (R, R, 3)."""
    return np.asarray(Image.open(io.BytesIO(record["bytes"])).convert("RGB"))


def copy_shard(source: Path, target: Path, *, rows: int, spec: str) -> None:
    """Writes the first rows of a data set's shard as another data set's, whole or not at all.

    Args:
        source: Parquet file of :func:`write_shard`.
        target: Where the copy goes.
        rows: Number of rows to copy.
        spec: The other data set's.
    """
    table = pq.read_table(source).slice(0, rows).combine_chunks()
    metadata = {**(table.schema.metadata or {}), _SPEC_KEY.encode(): spec.encode()}
    write_table(table.replace_schema_metadata(metadata), target)


def write_table(table: pa.Table, path: Path) -> None:
    """A Parquet file that is whole or not there."""
    sink = io.BytesIO()
    # PNG bytes do not compress further
    pq.write_table(table, sink, compression="none")
    write_atomic(path, sink.getvalue())


def encode_png(images: np.ndarray) -> list[bytes]:
    """uint8 (n, R, R, 3) to n PNG files."""
    files = []
    for image in images:
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, format="PNG")
        files.append(sink.getvalue())
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); delete it and repeat the synthesis"
        ) from error


def _labels(directory: Path, plan: SamplingPlan) -> np.ndarray:
    """int64 (n,) of all shards, in order."""
    tables = [pq.read_table(directory / shard.file, columns=["label"]) for shard in plan.shards]
    return np.concatenate([table.column("label").to_numpy() for table in tables])


def _card(manifest: dict[str, Any], privacy_note: PrivacyNote, label_note: str | None) -> str:
    label_text = "" if label_note is None else f"\n## Labels\n\n{label_note}\n"
    rows = "\n".join(
        f"| {label} | {name} | {prompt} | {count} |"
        for label, (name, prompt, count) in enumerate(
            zip(manifest["class_names"], manifest["prompts"], manifest["class_counts"], strict=True)
        )
    )
    frequencies = (
        "Labels are uniform over\nthe classes; they say nothing about how often a class occurs in "
        "the sensitive data."
    )
    if manifest["class_weights"]:
        frequencies = (
            "Labels follow the\nweights that the user gave as public knowledge "
            f"({', '.join(f'{weight:g}' for weight in manifest['class_weights'])})."
        )
    tags = "\n".join(f"- {tag}" for tag in ("synthetic", *privacy_note.tags))
    return f"""---
task_categories:
- image-classification
tags:
{tags}
configs:
- config_name: default
  data_files:
  - split: train
    path: "train-*.parquet"
---

# Synthetic images

{manifest["n_images"]} images made by a public diffusion model by `sapf-ray`.

## Privacy

{privacy_note.text}
{label_text}
## Contents

Parquet shards with the columns `image` (PNG), `label`, `prompt` and `seed`. {frequencies}

| label | class | prompt | images |
|---|---|---|---|
{rows}

```python
from datasets import load_dataset
data = load_dataset("path/to/this/directory", split="train")
```
"""
