"""Parquet files as Hugging Face ``datasets`` writes them.

This program writes its synthetic sets alike. Under ``data.path``, in one folder per split::

    [data/]train-00000-of-00002.parquet …  [data/]test-00000-of-00001.parquet
    [default/]train/0000.parquet …         [default/]test/0000.parquet

Files of other splits (validation, …) stay unused. Without test files, or with one .parquet file as
``data.path``, records are split by a hash of ``image.path`` (see
:func:`sapf_ray.data.files.split_of`), which then must be present and unique. The image column is a
struct of ``bytes`` and ``path``, or binary; the label column holds integers. The columns, and the
class names, are found in the key ``huggingface`` of the file's metadata; without it they are called
``image`` or ``img`` and ``label``, and the classes are numbered.

Opening reads footers and labels. ``read`` decodes row groups that hold a requested record, 64 rows
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
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import (
    SPLITS,
    Stamp,
    check_labels,
    evenly_spread,
    prompts_of,
    required_path,
    split_of,
    stamp,
)
from sapf_ray.errors import DataError, reason

# ``verify`` decodes 32 rows of each of 32 row groups, both evenly spread.
VERIFY_GROUPS = 32
VERIFY_ROWS = 32

_ROWS_AT_A_TIME = 64
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")
_NAMES = {"Image": ("image", "img"), "ClassLabel": ("label",)}


@dataclass(frozen=True, kw_only=True)
class _Columns:
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


@register("parquet")
class Parquet(ImageSource):
    """Images of any size in any format that Pillow reads, made square as an image folder's are.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: No training files, a shard is missing, or the columns are not as above; names the
            file.
    """

    row = DATA_SETS["parquet"]

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, self.row)
        self._files = _find(self.root)
        self._test_fraction = None if self._files["test"] else config.test_fraction
        self._groups = {
            split: tuple(_group_rows(path) for path in paths)
            for split, paths in self._files.items()
        }
        self._columns = self._common_columns()
        self.class_names = self._columns.class_names or self._numbered_classes()
        if len(self.class_names) < 2:
            first = self._files["train"][0]
            raise DataError(f"{first}: only one class; at least two are needed")
        self.prompts = prompts_of(self.class_names, config.prompt_template)
        self.n_train = self._count("train")
        self.n_test = self._count("test")

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
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
        labels = self._all_labels(home)[rows]
        where = f"{self.root}: column {self._columns.label}"
        return check_labels(labels, len(self.class_names), where=where)

    def fingerprint(self) -> str:
        """Over class names and every file's name, size, modification time and row groups."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in SPLITS:
            for path, groups in zip(self._files[split], self._groups[split], strict=True):
                line = f"{split}\0{path.name}\0{stamp(path)}\0{groups.tolist()}\n"
                digest.update(line.encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Decodes an evenly spread sample of 1,024 images per split.

        A damaged image outside it is found, and named, by ``read``.
        """
        for split in SPLITS:
            sizes = np.concatenate([np.empty(0, np.int64), *self._groups[split]])
            starts = np.cumsum(sizes) - sizes
            for group in evenly_spread(len(sizes), VERIFY_GROUPS):
                sample = evenly_spread(int(sizes[group]), VERIFY_ROWS)
                for _ in self._decode(split, starts[group] + sample, resolution=8):
                    pass

    def _common_columns(self) -> _Columns:
        """The columns and class names, which must be the same in all files."""
        first = self._files["train"][0]
        columns = _columns(first)
        for paths in self._files.values():
            for path in paths:
                if _columns(path) != columns:
                    raise DataError(
                        f"{path}: other columns or class names than {first.name}; "
                        "all files must have the same"
                    )
        return columns

    def _numbered_classes(self) -> tuple[str, ...]:
        highest = max(int(self._all_labels(split).max(initial=-1)) for split in SPLITS)
        return tuple(str(label) for label in range(highest + 1))

    def _count(self, split: Split) -> int:
        n = len(self.labels(split))
        if n == 0:
            raise DataError(f"{self.root}: no records in the {split} split")
        return n

    def _rows(self, split: Split) -> tuple[Split, np.ndarray]:
        """Under which name the files of a split are, and its rows in them, int64."""
        if self._test_fraction is None:
            n_rows = sum(int(groups.sum()) for groups in self._groups[split])
            return split, np.arange(n_rows)
        paths = self._files["train"]
        rows = _hashed(
            paths,
            columns=self._columns,
            test_fraction=self._test_fraction,
            _stamps=tuple(stamp(path) for path in paths),
        )
        return "train", rows[split]

    def _all_labels(self, home: Split) -> np.ndarray:
        column = self._columns.label
        labels = [_labels(path, column, _stamp=stamp(path)) for path in self._files[home]]
        return np.concatenate([np.empty(0, np.int64), *labels])

    def _decode(
        self,
        home: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[np.ndarray]:
        """The images of ascending, distinct rows."""
        file_start = 0
        for path, groups in zip(self._files[home], self._groups[home], strict=True):
            file_stop = file_start + int(groups.sum())
            inside = rows[(rows >= file_start) & (rows < file_stop)] - file_start
            file_start = file_stop
            ends = np.cumsum(groups)
            for group in np.unique(np.searchsorted(ends, inside, side="right")):
                start = int(ends[group] - groups[group])
                members = inside[(inside >= start) & (inside < ends[group])]
                row_group = _RowGroup(
                    path=path,
                    number=int(group),
                    start=start,
                    column=self._columns.image,
                )
                yield from row_group.decode(members - start, resolution)


def _find(root: Path) -> dict[Split, tuple[Path, ...]]:
    """Training and test files, sorted."""
    if root.is_file():
        return {"train": (root,), "test": ()}
    files = [path for path in root.rglob("*.parquet") if path.is_file()]
    files = sorted(path for path in files if not path.name.startswith("."))
    found: dict[Split, tuple[Path, ...]] = {}
    for split in SPLITS:
        members = [path for path in files if _is_of(path.relative_to(root), split)]
        folders = sorted({str(path.parent) for path in members})
        if len(folders) > 1:
            raise DataError(
                f"{root}: {split} files in several folders ({', '.join(folders)}); "
                "data.path must be one data set"
            )
        _check_complete(members)
        found[split] = tuple(members)
    if not found["train"]:
        expected = DATA_SETS["parquet"].path
        raise DataError(
            f"{root}: no training files; expected a {expected}, or sub-folders train/ and test/"
        )
    return found


def _is_of(relative: Path, split: str) -> bool:
    """Whether a file is of a split, by its own name or by a folder's."""
    named = re.match(rf"{split}(-.*)?\.parquet$", relative.name) is not None
    return named or split in relative.parts[:-1]


def _check_complete(paths: list[Path]) -> None:
    """Shards that say of how many they are one must all be there."""
    present = {path.name for path in paths}
    for path in paths:
        shard = _SHARD.fullmatch(path.name)
        if shard is None or len(paths) == int(shard[3]):
            continue
        n = int(shard[3])
        names = [f"{shard[1]}-{i:05d}-of-{shard[3]}.parquet" for i in range(n)]
        missing = [name for name in names if name not in present]
        if missing:
            raise DataError(
                f"{path.parent / missing[0]}: no such file; {path.name} is one of {n}; "
                "copy the data set again"
            )
        raise DataError(f"{path}: mixes two ways of cutting; copy the data set again")


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({reason(error)}); copy it again")


def _group_rows(path: Path) -> np.ndarray:
    """Number of rows of each row group, int64."""
    with _open(path) as file:
        metadata = file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.array(counts, np.int64)


def _columns(path: Path) -> _Columns:
    with _open(path) as file:
        schema = file.schema_arrow
    features = _features(schema, path)
    image = _column(path, schema, features=features, kind="Image")
    label = _column(path, schema, features=features, kind="ClassLabel")
    parts = _image_parts(path, schema.field(image))
    label_type = schema.field(label).type
    if not pa.types.is_integer(label_type):
        raise DataError(f"{path}: column {label} must be integers, is {label_type}")
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list):
        raise DataError(f"{path}: class names in the metadata must be a list")
    return _Columns(
        image=f"{image}.bytes" if parts else image,
        path=f"{image}.path" if "path" in parts else None,
        label=label,
        class_names=tuple(map(str, names)),
    )


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


def _features(schema: pa.Schema, path: Path) -> dict[str, Any]:
    """Column name → feature, as ``datasets`` notes them."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        return {name: row for name, row in features.items() if isinstance(row, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: metadata key huggingface is not as datasets writes it ({reason(error)})"
        ) from error


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


def _read_column(path: Path, leaf: str) -> pa.ChunkedArray:
    with _open(path) as file:
        try:
            return file.read([leaf]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


@lru_cache(maxsize=1024)
def _labels(
    path: Path,
    column: str,
    *,
    _stamp: Stamp,
) -> np.ndarray:
    values = _read_column(path, column)
    if values.null_count:
        raise DataError(f"{path}: column {column} has {values.null_count} empty cells")
    return values.to_numpy().astype(np.int64)


@lru_cache(maxsize=2)
def _hashed(
    paths: tuple[Path, ...],
    *,
    columns: _Columns,
    test_fraction: float,
    _stamps: tuple[Stamp, ...],
) -> dict[Split, np.ndarray]:
    """Rows of each split by a hash of the image's path."""
    names: list[str | None] = []
    if columns.path:
        for path in paths:
            column = _read_column(path, columns.path).combine_chunks()
            names += column.field("path").to_pylist()
    if not names or None in names or len(set(names)) != len(names):
        raise DataError(
            f"{paths[0].parent}: no test files, and images have no path of their own to split "
            "them by; expected files called test-*.parquet or a sub-folder test/"
        )
    splits = np.array([split_of(str(name), test_fraction) for name in names])
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


@dataclass(frozen=True, kw_only=True)
class _RowGroup:
    """The images of one row group.

    Attributes:
        path: The file.
        number: Which of the file's row groups.
        start: Row of the file at which the group begins.
        column: Leaf column of the images' content.
    """

    path: Path
    number: int
    start: int
    column: str

    def decode(self, rows: np.ndarray, resolution: int) -> Iterator[np.ndarray]:
        """Ascending rows of the group; errors count rows from the start of the file."""
        wanted = rows.tolist()
        with _open(self.path) as file:
            batches = file.iter_batches(
                _ROWS_AT_A_TIME,
                row_groups=[self.number],
                columns=[self.column],
            )
            start = 0
            while wanted:
                content = self._next(batches)
                stop = start + len(content)
                while wanted and wanted[0] < stop:
                    row = wanted.pop(0)
                    yield self._image(content[row - start].as_py(), row, resolution=resolution)
                start = stop

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.Array:
        """Content of the next rows."""
        try:
            column = next(batches).column(0)
        except StopIteration as error:
            raise _damaged(self.path, EOFError("cut off")) from error
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error
        return column.field("bytes") if self.column.endswith(".bytes") else column

    def _image(
        self,
        content: bytes | None,
        row: int,
        *,
        resolution: int,
    ) -> np.ndarray:
        name = f"{self.path}, row {self.start + row}"
        if content is None:
            raise DataError(
                f"{name}: no image bytes; the file names images that lie elsewhere, "
                "embed them first"
            )
        return decode(content, resolution, name=name)
