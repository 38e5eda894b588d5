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
from collections.abc import Iterator, Sequence

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import Grouping
from sapf_ray.data.base import SPLITS, Split, no_such_groups, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.columns import Columns
from sapf_ray.data.files import evenly_spread, required_path, stamp
from sapf_ray.data.parquet import (
    RowGroup,
    find_files,
    group_column,
    group_rows,
    hashed_rows,
    image_paths,
    read_columns,
    read_labels,
)
from sapf_ray.data.path_groups import path_groups
from sapf_ray.data.record_source import Decoded, RecordSource
from sapf_ray.data.table_source import TableLabels
from sapf_ray.errors import DataError

# ``verify`` decodes 32 rows of each of 32 row groups, both evenly spread.
VERIFY_GROUPS = 32
VERIFY_ROWS = 32


@register("parquet")
class Parquet(TableLabels, RecordSource):
    """Images of any size in any format that Pillow reads, made square as an image folder's are.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: No training files, a shard is missing, or the columns are not as above; names the
            file.
    """

    row = DATA_SETS["parquet"]

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, self.row)
        self.heed(config)
        self._files = find_files(self.root)
        if self._files["test"]:
            self._test_fraction = None
        self._groups = {
            split: tuple(group_rows(path) for path in paths) for split, paths in self._files.items()
        }
        self._columns = self._common_columns()
        where = f"{self._files['train'][0]}: column {self._columns.label}"
        self.open_classes(config, self._columns.class_names, where=where)

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        home, records = self.records(split)
        return self._decode(home, records[rows], resolution=resolution)

    def sample(self, split: Split) -> np.ndarray:
        """Records in an evenly spread sample of rows, to decode few row groups."""
        home, records = self.records(split)
        sizes = np.concatenate([np.empty(0, np.int64), *self._groups[home]])
        starts = np.cumsum(sizes) - sizes
        groups = evenly_spread(len(sizes), VERIFY_GROUPS)
        spread = [starts[g] + evenly_spread(int(sizes[g]), VERIFY_ROWS) for g in groups]
        return np.flatnonzero(np.isin(records, np.concatenate(spread)))

    def fingerprint(self) -> str:
        """Over class names and every file's name, size, modification time and row groups."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in SPLITS:
            for path, groups in zip(self._files[split], self._groups[split], strict=True):
                line = f"{split}\0{path.name}\0{stamp(path)}\0{groups.tolist()}\n"
                digest.update(line.encode())
        if self._pixel_range is not None:
            digest.update(f"pixel_range\0{self._pixel_range}".encode())
        if self.skips:
            digest.update(b"on_error\0skip")
        return digest.hexdigest()

    def own_labels(self, home: Split) -> np.ndarray:
        column = self._columns.label
        labels = [read_labels(path, column, _stamp=stamp(path)) for path in self._files[home]]
        return np.concatenate([np.empty(0, np.int64), *labels])

    def group_names(self, grouping: Grouping) -> Sequence[str]:
        """By any column of text or integers, or from ``image.path``."""
        home, rows = self.records("train")
        files = self._files[home]
        if grouping.by == "column":
            names = np.concatenate([group_column(path, grouping.value) for path in files])
            return names[rows].tolist()
        if self._columns.path is None:
            raise no_such_groups(grouping, self.name, able="column (images have no path here)")
        paths = np.concatenate([image_paths(path, self._columns.path) for path in files])
        able = "column, folder and pattern"
        return path_groups(paths[rows].tolist(), grouping, source=self.name, able=able)

    def split_rows(self, split: Split) -> tuple[Split, np.ndarray]:
        if self._test_fraction is None:
            n_rows = sum(int(groups.sum()) for groups in self._groups[split])
            return split, np.arange(n_rows)
        paths = self._files["train"]
        rows = hashed_rows(
            paths,
            columns=self._columns,
            test_fraction=self._test_fraction,
            _stamps=tuple(stamp(path) for path in paths),
        )
        return "train", rows[split]

    def _common_columns(self) -> Columns:
        """The columns and class names, which must be the same in all files."""
        first = self._files["train"][0]
        columns = read_columns(first)
        for paths in self._files.values():
            for path in paths:
                if read_columns(path) != columns:
                    raise DataError(
                        f"{path}: other columns or class names than {first.name}; "
                        "all files must have the same"
                    )
        return columns

    def _decode(
        self,
        home: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
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
                row_group = RowGroup(
                    path=path,
                    number=int(group),
                    start=start,
                    column=self._columns.image,
                    pixel_range=self._pixel_range,
                )
                yield from row_group.decode(members - start, resolution)
