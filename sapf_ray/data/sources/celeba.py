"""CelebA, aligned and cropped faces, labelled by the attribute Male.

Layouts, in ``data.path`` or its sub-folder ``celeba``::

    as torchvision unpacks it:  img_align_celeba/000001.jpg …
                                list_attr_celeba.txt, list_eval_partition.txt
    as published:               Img/img_align_celeba/ …
                                Anno/list_attr_celeba.txt, Eval/list_eval_partition.txt
    Kaggle's copy:              img_align_celeba/img_align_celeba/ …
                                list_attr_celeba.csv, list_eval_partition.csv

Partition 0 trains, 2 tests, 1 (validation) stays unused. Images are 178x218; as in DPImageBench
(``data/preprocess_dataset.py``, ``center-crop``) the central 178x178 (rows 20 to 197) is kept and
resized. DPImageBench resizes with a Lanczos filter, this program with the bilinear one it uses
everywhere. The paper's 256 pixels are an enlargement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import Grouping
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.files import Stamp, first_existing, required_path, stamp
from sapf_ray.data.findings import Findings
from sapf_ray.data.image_files import FileIndex, ImageFiles
from sapf_ray.data.path_groups import path_groups
from sapf_ray.errors import DataError

ATTRIBUTE = "Male"
N_PUBLISHED = 202_599

_ROW = DATA_SETS["celeba"]
_PARTS: dict[Split, int] = {"train": 0, "test": 2}
_IMAGES = (
    "img_align_celeba/img_align_celeba",
    "img_align_celeba",
    "Img/img_align_celeba",
)


@register("celeba")
class CelebA(ImageFiles):
    """Label 0 female, 1 male. Opening reads the two lists (about 30 MB as published), no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A file is missing or not in the published format; names it.
    """

    row = _ROW

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, self.row)
        self.heed(config)
        if (self.root / "celeba").is_dir():
            self.root = self.root / "celeba"
        folder = first_existing(self.root, _IMAGES, row=self.row)
        self.folder = folder.relative_to(self.root).as_posix()
        attributes = self._list("list_attr_celeba", folder="Anno")
        partition = self._list("list_eval_partition", folder="Eval")
        self.lists = (attributes, partition)
        self._read_names_and_sizes()

    def index(self) -> FileIndex:
        stamps = tuple(stamp(path) for path in self.lists)
        return _index(self.folder, self.lists, _stamps=stamps)

    def group_names(self, grouping: Grouping) -> Sequence[str]:
        """The published identities (``identity_CelebA.txt``), or by paths."""
        paths = self._unchanged_index().paths["train"].to_pylist()
        if grouping.by != "published":
            return path_groups(paths, grouping, source=self.name, able="published and pattern")
        identities = self._list("identity_CelebA", folder="Anno")
        names, numbers = _sorted(*_table(identities, None, dtype=np.int64))
        wanted = np.array([path.rpartition("/")[2].encode() for path in paths])
        places = np.searchsorted(names, wanted).clip(max=len(names) - 1)
        if not np.array_equal(names[places], wanted):
            raise DataError(f"{identities}: lacks training images; {_ROW.obtain}")
        return numbers[places].astype(str).tolist()

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        _, partition = self.lists
        names, _ = _table(partition, None)
        self.check_published_sizes(len(names), N_PUBLISHED)
        return super().inspect(splits)

    def _list(self, name: str, *, folder: str) -> Path:
        places = (f"{name}.txt", f"{folder}/{name}.txt", f"{name}.csv")
        return first_existing(self.root, places, row=self.row)


@lru_cache(maxsize=2)
def _index(
    folder: str,
    lists: tuple[Path, ...],
    *,
    _stamps: tuple[Stamp, ...],
) -> FileIndex:
    attributes, partition = lists
    names, male = _sorted(*_table(attributes, ATTRIBUTE))
    listed, parts = _sorted(*_table(partition, None))
    if not np.array_equal(names, listed):
        raise DataError(
            f"{partition}: lists other images ({len(listed)}) than {attributes.name} "
            f"({len(names)}); {_ROW.obtain}"
        )
    if (names[1:] == names[:-1]).any():
        raise DataError(f"{attributes}: lists an image twice; {_ROW.obtain}")
    _check_values(male, (-1, 0, 1), path=attributes)
    _check_values(parts, (0, 1, 2), path=partition)

    index = FileIndex()
    for split, part in _PARTS.items():
        rows = parts == part
        if not rows.any():
            raise DataError(f"{partition}: no image of partition {part} ({split}); {_ROW.obtain}")
        paths = [f"{folder}/{name.decode()}" for name in names[rows]]
        labels = (male[rows] == 1).astype(np.int64)
        index.add(split, paths=pa.array(paths, pa.string()), labels=labels)
    return index


def _sorted(names: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(names, kind="stable")
    return names[order], values[order]


def _check_values(
    values: np.ndarray,
    allowed: tuple[int, ...],
    *,
    path: Path,
) -> None:
    if np.isin(values, allowed).all():
        return
    among = ", ".join(map(str, allowed))
    raise DataError(f"{path}: values must be among {among}; {_ROW.obtain}")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where in a list its table is.

    Attributes:
        start: Number of lines before the table.
        position: Cell of the column in a line.
        comma: What separates cells; None for blanks.
        count: Number of rows that the list announces, None if it does not.
    """

    start: int
    position: int
    comma: str | None = None
    count: int | None = None


def _table(
    path: Path, column: str | None, *, dtype: type[np.integer] = np.int8
) -> tuple[np.ndarray, np.ndarray]:
    """Image names (bytes) and one integer column of a list: the named one, or the only one."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as a text list ({type(error).__name__}); {_ROW.obtain}"
        ) from error
    layout = _layout(path, lines, column=column)
    rows = lines[layout.start :]
    names = []
    values = np.empty(len(rows), dtype)
    for number, line in enumerate(rows):
        cells = line.split(layout.comma)
        try:
            names.append(cells[0].encode())
            values[number] = int(cells[layout.position])
        except (IndexError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: line {layout.start + number + 1} is not an image name and its values; "
                f"{_ROW.obtain}"
            ) from error
    if layout.count is not None and layout.count != len(names):
        raise DataError(
            f"{path}: announces {layout.count} rows, has {len(names)}; the file is cut off, "
            f"{_ROW.obtain}"
        )
    return np.array(names, dtype=bytes), values


def _layout(
    path: Path,
    lines: list[str],
    *,
    column: str | None,
) -> _Layout:
    """How a list is laid out.

    A .txt list of attributes starts with a line that counts its rows and a line of column names;
    the .txt partition starts with neither. A .csv starts with column names, ``image_id`` first.
    """
    if path.suffix == ".csv":
        header = [name.strip() for name in lines[0].split(",")] if lines else [""]
        if header[0] != "image_id":
            raise DataError(
                f"{path}: first line must name the columns, image_id first; {_ROW.obtain}"
            )
        return _Layout(
            start=1,
            position=_position(path, header, column=column),
            comma=",",
        )
    if column is None:
        return _Layout(start=0, position=1)
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise DataError(
            f"{path}: first line must be the number of rows, second the column names; {_ROW.obtain}"
        )
    header = ["", *lines[1].split()]
    position = _position(path, header, column=column)
    return _Layout(
        start=2,
        position=position,
        count=int(lines[0]),
    )


def _position(
    path: Path,
    header: list[str],
    *,
    column: str | None,
) -> int:
    if column is None:
        return 1
    if column not in header:
        raise DataError(f"{path}: no column {column}; {_ROW.obtain}")
    return header.index(column)
