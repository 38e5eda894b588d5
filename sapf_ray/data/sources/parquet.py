"""Parquet files as Hugging Face ``datasets`` writes them, and as this program writes its synthetic
sets.

Under ``data.path``, in one folder per split::

    [data/]train-00000-of-00002.parquet …  [data/]test-00000-of-00001.parquet
    [default/]train/0000.parquet …         [default/]test/0000.parquet

Files of other splits (validation, …) stay unused. Without test files, or with one .parquet file as
``data.path``, records are split by a hash of ``image.path`` (see
:func:`sapf_ray.data.files.split_of`), which then must be present and unique. The image column is a
struct of ``bytes`` and ``path``, or binary; the label column holds integers. The columns, and the
class names, are found in the key ``huggingface`` of the file's metadata; without it they are called
``image`` or ``img`` and ``label``, and the classes are numbered.

Opening reads footers and labels. ``read`` decodes row groups that hold a record asked for, 64 rows
at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import CATALOG
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import (
    SPLITS,
    Stamp,
    check_labels,
    evenly_spread,
    required_path,
    split_of,
    stamp,
)
from sapf_ray.errors import DataError

VERIFY_GROUPS, VERIFY_ROWS = 32, 32
"""``verify`` decodes 32 rows of each of 32 row groups, both evenly spread."""

_ROWS_AT_A_TIME = 64
_ROW = CATALOG["parquet"]
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")
_NAMES = {"Image": ("image", "img"), "ClassLabel": ("label",)}


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Leaf columns of image content and of the image's path (None where there is none), and the
    label column.
    """

    image: str
    path: str | None
    label: str


@register("parquet")
class Parquet(ImageSource):
    """Images of any size in any format that Pillow reads, made square as an image folder's are.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: No training files, a shard is missing, or the columns are not as above; names the
            file.
    """

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, _ROW)
        self._files = _find(self.root)
        self._test_fraction = None if self._files["test"] else config.test_fraction
        self._groups = {
            split: tuple(_group_rows(path) for path in paths)
            for split, paths in self._files.items()
        }
        first = self._files["train"][0]
        self._columns, names = _columns(first)
        for path in (path for paths in self._files.values() for path in paths):
            if _columns(path) != (self._columns, names):
                raise DataError(
                    f"{path}: other columns or class names than {first.name}; all files must have the same"
                )
        if not names:
            top = max(int(self._all_labels(split).max(initial=-1)) for split in SPLITS)
            names = tuple(str(i) for i in range(top + 1))
        if len(names) < 2:
            raise DataError(f"{first}: only one class; at least two are needed")
        self.class_names = names
        self.prompts = tuple(
            config.prompt_template.replace("{name}", name.replace("_", " ")) for name in names
        )
        self.n_train, self.n_test = (len(self.labels(split)) for split in SPLITS)
        for split, n in (("train", self.n_train), ("test", self.n_test)):
            if n == 0:
                raise DataError(f"{self.root}: no records in the {split} split")

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        home, rows = self._rows(split)
        indices = check_indices(indices, len(rows), split=split)
        wanted, places = np.unique(rows[indices], return_inverse=True)
        images = np.empty((len(wanted), resolution, resolution, 3), dtype=np.uint8)
        for i, image in enumerate(self._decode(home, wanted, resolution=resolution)):
            images[i] = image
        return images[places], self.labels(split)[indices]

    def labels(self, split: Split) -> np.ndarray:
        home, rows = self._rows(split)
        return check_labels(
            self._all_labels(home)[rows],
            len(self.class_names),
            where=f"{self.root}: column {self._columns.label}",
        )

    def fingerprint(self) -> str:
        """Over class names and every file's relative path, size, modification time and row groups."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in SPLITS:
            for path, groups in zip(self._files[split], self._groups[split], strict=True):
                digest.update(f"{split}\0{path.name}\0{stamp(path)}\0{groups.tolist()}\n".encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Decodes an evenly spread sample of 1,024 images per split; one outside it is met, and
        named, by ``read``.
        """
        for split in SPLITS:
            sizes = np.concatenate([np.empty(0, np.int64), *self._groups[split]])
            starts = np.cumsum(sizes) - sizes
            rows = [
                starts[g] + evenly_spread(int(sizes[g]), VERIFY_ROWS)
                for g in evenly_spread(len(sizes), VERIFY_GROUPS)
            ]
            for part in rows:
                for _ in self._decode(split, part, resolution=8):
                    pass

    def _rows(self, split: Split) -> tuple[Split, np.ndarray]:
        """Under which name the files of a split are, and its rows in them, int64."""
        if self._test_fraction is None:
            return split, np.arange(sum(int(groups.sum()) for groups in self._groups[split]))
        stamps = tuple(stamp(path) for path in self._files["train"])
        return "train", _hashed(
            self._files["train"], stamps, columns=self._columns, test_fraction=self._test_fraction
        )[split]

    def _all_labels(self, home: Split) -> np.ndarray:
        return np.concatenate(
            [
                np.empty(0, np.int64),
                *(_labels(path, stamp(path), self._columns.label) for path in self._files[home]),
            ]
        )

    def _decode(self, home: Split, rows: np.ndarray, *, resolution: int) -> Iterator[np.ndarray]:
        """The images of ascending, distinct rows."""
        first = 0  # row at which the file begins
        for path, groups in zip(self._files[home], self._groups[home], strict=True):
            ends = np.cumsum(groups)
            inside = rows[(rows >= first) & (rows < first + groups.sum())] - first
            first += int(groups.sum())
            for group in np.unique(np.searchsorted(ends, inside, side="right")):
                start = int(ends[group] - groups[group])
                members = inside[(inside >= start) & (inside < ends[group])]
                yield from _decode_group(
                    path, int(group), members - start, start, self._columns, resolution
                )


def _find(root: Path) -> dict[Split, tuple[Path, ...]]:
    """Training and test files, sorted."""
    if root.is_file():
        return {"train": (root,), "test": ()}
    found: dict[Split, tuple[Path, ...]] = {}
    files = sorted(p for p in root.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))
    for split in SPLITS:
        mine = [p for p in files if _named(p.relative_to(root), split)]
        folders = sorted({str(p.parent) for p in mine})
        if len(folders) > 1:
            raise DataError(
                f"{root}: {split} files in several folders ({', '.join(folders)}); data.path must be one data set"
            )
        for path in mine:
            if (shard := _SHARD.fullmatch(path.name)) and len(mine) != int(shard[3]):
                present = {p.name for p in mine}
                names = (f"{shard[1]}-{i:05d}-of-{shard[3]}.parquet" for i in range(int(shard[3])))
                missing = next((name for name in names if name not in present), None)
                reason = (
                    f"no such file; {path.name} is one of {int(shard[3])}"
                    if missing
                    else "mixes two ways of cutting"
                )
                raise DataError(
                    f"{path.parent / (missing or path.name)}: {reason}; copy the data set again"
                )
        found[split] = tuple(mine)
    if not found["train"]:
        raise DataError(
            f"{root}: no training files; expected a {_ROW.path}, or sub-folders train/ and test/"
        )
    return found


def _named(relative: Path, split: str) -> bool:
    return (
        re.match(rf"{split}(-.*)?\.parquet$", relative.name) is not None
        or split in relative.parts[:-1]
    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); copy it again"


def _group_rows(path: Path) -> np.ndarray:
    with _open(path) as file:
        return np.array(
            [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], np.int64
        )


def _columns(path: Path) -> tuple[_Columns, tuple[str, ...]]:
    """Columns of a file and its class names; none where the metadata do not tell them."""
    with _open(path) as file:
        schema = file.schema_arrow
    features = _features(schema, path)
    image, label = (
        _column(path, schema, features=features, kind=kind) for kind in ("Image", "ClassLabel")
    )
    type_ = schema.field(image).type
    parts = (
        [type_.field(i).name for i in range(type_.num_fields)] if pa.types.is_struct(type_) else []
    )
    content = type_.field("bytes").type if "bytes" in parts else type_
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise DataError(
            f"{path}: column {image} must be binary, or a struct with the images' bytes, is {type_}"
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{path}: column {label} must be integers, is {schema.field(label).type}")
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list):
        raise DataError(f"{path}: class names in the metadata must be a list")
    columns = _Columns(
        image=f"{image}.bytes" if parts else image,
        path=f"{image}.path" if "path" in parts else None,
        label=label,
    )
    return columns, tuple(map(str, names))


def _features(schema: pa.Schema, path: Path) -> dict[str, Any]:
    """Column name → feature, as ``datasets`` notes them."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        return {name: f for name, f in features.items() if isinstance(f, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: metadata key huggingface is not as datasets writes it ({error})"
        ) from error


def _column(path: Path, schema: pa.Schema, *, features: dict[str, Any], kind: str) -> str:
    marked = [
        name
        for name, feature in features.items()
        if feature.get("_type") == kind and name in schema.names
    ]
    usual = [name for name in _NAMES[kind] if name in (marked or schema.names)]
    if usual or len(marked) == 1:
        return (usual or marked)[0]
    expected = (
        f"called {' or '.join(_NAMES[kind])}"
        if not marked
        else f"one of {', '.join(marked)} called {_NAMES[kind][0]}"
    )
    raise DataError(
        f"{path}: columns are {', '.join(schema.names)}; expected a {kind} column {expected}"
    )


def _read_column(path: Path, leaf: str) -> pa.ChunkedArray:
    with _open(path) as file:
        try:
            return file.read([leaf]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(_damaged(path, error)) from error


@lru_cache(maxsize=1024)
def _labels(path: Path, _stamp: Stamp, column: str) -> np.ndarray:
    values = _read_column(path, column)
    if values.null_count:
        raise DataError(f"{path}: column {column} has {values.null_count} empty cells")
    return values.to_numpy().astype(np.int64)


@lru_cache(maxsize=2)
def _hashed(
    paths: tuple[Path, ...], _stamps: tuple[Stamp, ...], *, columns: _Columns, test_fraction: float
) -> dict[Split, np.ndarray]:
    """Rows of each split by a hash of the image's path."""
    names: list[str | None] = []
    if columns.path:
        for path in paths:
            names += _read_column(path, columns.path).combine_chunks().field("path").to_pylist()
    if not names or None in names or len(set(names)) != len(names):
        raise DataError(
            f"{paths[0].parent}: no test files, and images have no path of their own to split them by; "
            "expected files called test-*.parquet or a sub-folder test/"
        )
    test = np.array([split_of(str(name), test_fraction) == "test" for name in names])
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def _decode_group(
    path: Path, group: int, rows: np.ndarray, group_start: int, columns: _Columns, resolution: int
) -> Iterator[np.ndarray]:
    """Ascending rows of one row group; errors count rows from the start of the file."""
    wanted = set(rows.tolist())
    with _open(path) as file:
        batches = file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[columns.image])
        start = 0
        while wanted:
            try:
                column = next(batches).column(0)
            except (StopIteration, pa.ArrowException, OSError) as error:
                raise DataError(
                    _damaged(path, error if str(error) else EOFError("cut off"))
                ) from error
            content = column.field("bytes") if columns.image.endswith(".bytes") else column
            for row in sorted(r for r in wanted if r < start + len(column)):
                wanted.discard(row)
                name, value = f"{path}, row {group_start + row}", content[row - start].as_py()
                if value is None:
                    raise DataError(
                        f"{name}: no image bytes; the file names images that lie elsewhere, embed them first"
                    )
                yield decode(value, resolution, name)
            start += len(column)
