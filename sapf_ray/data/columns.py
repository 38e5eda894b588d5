"""Columns of images and labels as Hugging Face ``datasets`` marks them, in Parquet and in Arrow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sapf_ray.data.base import SPLITS, Split
from sapf_ray.data.files import split_of
from sapf_ray.errors import DataError, reason

_NAMES = {"Image": ("image", "img"), "ClassLabel": ("label",)}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a file's metadata says of its columns.

    Attributes:
        image: Leaf column of the images' content.
        path: Leaf column of the images' paths, None where there is none.
        label: The label column.
        class_names: Names of the classes; none where the metadata have none.
    """

    image: str
    path: str | None
    label: str
    class_names: tuple[str, ...]


def find_columns(
    schema: pa.Schema,
    features: dict[str, Any],
    *,
    where: Path,
) -> Columns:
    """The columns of a table and its class names.

    Args:
        schema: The table's.
        features: Column name → feature, as ``datasets`` notes them; empty where it did not.
        where: The file, for errors.

    Raises:
        DataError: A column is missing or of another type.
    """
    image = _column(where, schema, features=features, kind="Image")
    label = _column(where, schema, features=features, kind="ClassLabel")
    parts = _image_parts(where, schema.field(image))
    label_type = schema.field(label).type
    if not pa.types.is_integer(label_type):
        raise DataError(f"{where}: column {label} must be integers, is {label_type}")
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list):
        raise DataError(f"{where}: class names in the metadata must be a list")
    return Columns(
        image=f"{image}.bytes" if parts else image,
        path=f"{image}.path" if "path" in parts else None,
        label=label,
        class_names=tuple(map(str, names)),
    )


def features_of(schema: pa.Schema, path: Path) -> dict[str, Any]:
    """Column name → feature, from the key ``huggingface`` of a table's metadata.

    Raises:
        DataError: The key holds something else.
    """
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        return features_in(json.loads(raw)["info"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: metadata key huggingface is not as datasets writes it ({reason(error)})"
        ) from error


def features_in(info: dict[str, Any]) -> dict[str, Any]:
    """Those of a ``DatasetInfo``, one dict per column."""
    return {name: row for name, row in info["features"].items() if isinstance(row, dict)}


def image_bytes(content: bytes | None, name: str) -> bytes:
    """The content of an image.

    Raises:
        DataError: There is none, as where a table names files that lie elsewhere.
    """
    if content is None:
        raise DataError(
            f"{name}: no image bytes; the file names images that lie elsewhere, embed them first"
        )
    return content


def hashed_records(
    names: Sequence[str | None],
    test_fraction: float,
    *,
    where: object,
    expected: str,
) -> dict[Split, np.ndarray]:
    """Positions of each split, int64, by a hash of the records' own names.

    Args:
        names: One per record.
        test_fraction: Share of the test split.
        where: What an error names.
        expected: What would give the split instead.

    Raises:
        DataError: A record has no name of its own.
    """
    if not names or None in names or len(set(names)) != len(names):
        raise DataError(
            f"{where}: no test files, and images have no path of their own to split "
            f"them by; expected {expected}"
        )
    splits = np.array([split_of(str(name), test_fraction) for name in names])
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _image_parts(path: Path, field: pa.Field) -> list[str]:
    """Names within the struct of an image column; none if it is binary."""
    parts = []
    content = field.type
    if pa.types.is_struct(content):
        parts = [content.field(i).name for i in range(content.num_fields)]
    if "bytes" in parts:
        content = content.field("bytes").type
    if pa.types.is_binary(content) or pa.types.is_large_binary(content):
        return parts
    raise DataError(
        f"{path}: column {field.name} must be binary, or a struct with the images' bytes, "
        f"is {field.type}"
    )


def _column(
    path: Path,
    schema: pa.Schema,
    *,
    features: dict[str, Any],
    kind: str,
) -> str:
    """The column of a kind: marked as such in the metadata, or called as usual."""
    marked = []
    for name, feature in features.items():
        if name in schema.names and feature.get("_type") == kind:
            marked.append(name)
    candidates = marked or schema.names
    for name in _NAMES[kind]:
        if name in candidates:
            return name
    if len(marked) == 1:
        return marked[0]
    expected = f"called {' or '.join(_NAMES[kind])}"
    if marked:
        expected = f"one of {', '.join(marked)} called {_NAMES[kind][0]}"
    present = ", ".join(schema.names)
    raise DataError(f"{path}: columns are {present}; expected a {kind} column {expected}")
