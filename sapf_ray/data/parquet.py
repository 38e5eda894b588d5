"""Parquet files of images: finding them, their columns, their rows.

What they must look like, :mod:`sapf_ray.data.sources.parquet` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapf_ray.config.groups import KEY
from sapf_ray.data.base import SPLITS, Split
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.columns import Columns, features_of, find_columns, hashed_records, image_bytes
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import Stamp
from sapf_ray.data.pixels import PixelRange
from sapf_ray.data.record_source import Decoded, attempt
from sapf_ray.errors import ConfigError, DataError, reason

_ROWS_AT_A_TIME = 64
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")


def find_files(root: Path) -> dict[Split, tuple[Path, ...]]:
    """Training and test files, sorted.

    Raises:
        DataError: There are no training files, several data sets, or a shard is missing.
    """
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


def group_rows(path: Path) -> np.ndarray:
    """Number of rows of each row group, int64."""
    with _open(path) as file:
        metadata = file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.array(counts, np.int64)


def read_columns(path: Path) -> Columns:
    """The columns of a file and its class names.

    Raises:
        DataError: A column is missing or of another type.
    """
    with _open(path) as file:
        schema = file.schema_arrow
    return find_columns(schema, features_of(schema, path), where=path)


def _read_column(path: Path, leaf: str) -> pa.ChunkedArray:
    with _open(path) as file:
        try:
            return file.read([leaf]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


@lru_cache(maxsize=1024)
def read_labels(
    path: Path,
    column: str,
    *,
    _stamp: Stamp,
) -> np.ndarray:
    """The label column of a file, int64.

    Raises:
        DataError: It has empty cells.
    """
    values = _read_column(path, column)
    if values.null_count:
        raise DataError(f"{path}: column {column} has {values.null_count} empty cells")
    return values.to_numpy().astype(np.int64)


def group_column(path: Path, column: str) -> np.ndarray:
    """Names of groups in a column of text or integers, one per row of the file.

    Raises:
        ConfigError: No such column, or one of another type.
        DataError: It has empty cells.
    """
    given = f"column:{column}"
    with _open(path) as file:
        schema = file.schema_arrow
    if column not in schema.names:
        columns = ", ".join(schema.names)
        raise ConfigError(KEY, given, f"must name a column of {path.name}; it has {columns}")
    kind = schema.field(column).type
    texts = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_text(kind) for is_text in texts):
        raise ConfigError(KEY, given, f"must be a column of text or integers, is of {kind}")
    cells = _read_column(path, column).to_pylist()
    values = ["" if cell is None else str(cell).strip() for cell in cells]
    if "" in values:
        raise DataError(f"{path}: column {column} has empty cells; {KEY} needs one in every row")
    return np.array(values, dtype=str)


def image_paths(path: Path, leaf: str) -> np.ndarray:
    """The images' own paths, one per row of the file; empty text where there is none."""
    column = _read_column(path, leaf).combine_chunks()
    return np.array([name or "" for name in column.field("path").to_pylist()], dtype=str)


@lru_cache(maxsize=2)
def hashed_rows(
    paths: tuple[Path, ...],
    *,
    columns: Columns,
    test_fraction: float,
    _stamps: tuple[Stamp, ...],
) -> dict[Split, np.ndarray]:
    """Rows of each split by a hash of the image's path."""
    names: list[str | None] = []
    if columns.path:
        for path in paths:
            column = _read_column(path, columns.path).combine_chunks()
            names += column.field("path").to_pylist()
    return hashed_records(
        names,
        test_fraction,
        where=paths[0].parent,
        expected="files called test-*.parquet or a sub-folder test/",
    )


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The images of one row group.

    Attributes:
        path: The file.
        number: Which of the file's row groups.
        start: Row of the file at which the group begins.
        column: Leaf column of the images' content.
        pixel_range: Values shown black and white, for pixels of more than 8 bits.
    """

    path: Path
    number: int
    start: int
    column: str
    pixel_range: PixelRange | None = None

    def decode(self, rows: np.ndarray, resolution: int) -> Iterator[Decoded]:
        """Ascending rows of the group; errors count rows from the start of the file."""
        wanted = rows.tolist()
        try:
            for row, content in self._contents(wanted):
                yield attempt(partial(self._image, content, row, resolution=resolution))
        except DataError as error:  # the file is damaged here: so are all rows that follow
            yield from [error] * len(wanted)

    def _contents(self, wanted: list[int]) -> Iterator[tuple[int, bytes | None]]:
        """Rows with the bytes of their images; what is given is taken off the list."""
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
                    yield row, content[row - start].as_py()
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
        return decode(
            image_bytes(content, name), resolution, name=name, pixel_range=self.pixel_range
        )
