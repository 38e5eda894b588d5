"""A Hugging Face data set on disk, as ``save_to_disk`` of a Dataset or DatasetDict writes it.

``data.path`` is the folder of ``dataset_dict.json``, or that of ``state.json`` and
``dataset_info.json``. Splits may be called as people call them; without a test set the validation
set serves as one. Records of a single set are split by a hash of the images' paths, which then must
be there and differ. The image column is an ``Image`` feature with its bytes inside, the label
column a ``ClassLabel`` or integers. Files are mapped into memory through pyarrow, without
``datasets``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.arrow import SavedSet, is_saved, open_saved, split_folders
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.columns import hashed_records, image_bytes
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import Stamp, required_path, stamp
from sapf_ray.data.layouts import ROLES
from sapf_ray.data.record_source import Decoded, RecordSource, attempt
from sapf_ray.data.table_source import TableLabels
from sapf_ray.data.walking import shown
from sapf_ray.errors import DataError


@register("arrow")
class ArrowFolder(TableLabels, RecordSource):
    """Opening maps the files, and reads labels and no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: Not such a folder, a file is missing or damaged; names it.
    """

    row = DATA_SETS["arrow"]

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, self.row)
        self.heed(config)
        if not is_saved(self.root):
            raise DataError(
                f"{shown(self.root)}: no dataset_dict.json or state.json; "
                f"expected the {self.row.path}"
            )
        self._sets = self._splits()
        columns = {saved.columns for saved in self._sets.values()}
        if len(columns) > 1:
            raise DataError(f"{shown(self.root)}: splits differ in their columns or class names")
        (self._columns,) = columns
        where = f"{shown(self.root)}: column {self._columns.label}"
        self.open_classes(config, self._columns.class_names, where=where)

    def own_labels(self, home: Split) -> np.ndarray:
        if home not in self._sets:
            return np.empty(0, np.int64)
        saved = self._sets[home]
        return _labels(saved, _stamps=tuple(stamp(path) for path in saved.files))

    def split_rows(self, split: Split) -> tuple[Split, np.ndarray]:
        if "test" in self._sets:
            return split, np.arange(len(self.own_labels(split)))
        saved = self._sets["train"]
        stamps = tuple(stamp(path) for path in saved.files)
        return "train", _hashed(saved, self._test_fraction, _stamps=stamps)[split]

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        home, records = self.records(split)
        column = self._sets[home].table()[self._columns.image.removesuffix(".bytes")]
        for row in records[rows].tolist():
            cell = column[row].as_py()
            place = f"{home} row {row}"
            yield attempt(partial(self._image, cell, place, resolution=resolution))

    def fingerprint(self) -> str:
        """Over class names and every file's name, size and modification time."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in SPLITS:
            if split in self._sets:
                for path in self._sets[split].files:
                    digest.update(f"{split}\0{path.name}\0{stamp(path)}\n".encode())
        digest.update(repr((self._pixel_range, self.skips)).encode())
        return digest.hexdigest()

    def _splits(self) -> dict[Split, SavedSet]:
        folders = split_folders(self.root)
        if "" in folders:
            return {"train": open_saved(self.root)}
        roles = {ROLES.get(name.casefold()): folder for name, folder in folders.items()}
        if "train" not in roles:
            raise DataError(
                f"{shown(self.root)}: no split called train among {', '.join(folders) or 'none'}"
            )
        found: dict[Split, SavedSet] = {"train": open_saved(roles["train"])}
        test = roles.get("test") or roles.get("val")
        if test is not None:
            found["test"] = open_saved(test)
        return found

    def _image(self, cell: Any, place: str, *, resolution: int) -> np.ndarray:
        name = f"{shown(self.root)}, {place}"
        content = cell["bytes"] if isinstance(cell, dict) else cell
        return decode(
            image_bytes(content, name), resolution, name=name, pixel_range=self._pixel_range
        )


@lru_cache(maxsize=4)
def _labels(saved: SavedSet, *, _stamps: tuple[Stamp, ...]) -> np.ndarray:
    column = saved.table()[saved.columns.label]
    if column.null_count:
        raise DataError(
            f"{shown(saved.folder)}: column {saved.columns.label} has {column.null_count} "
            "empty cells"
        )
    return column.to_numpy().astype(np.int64)


@lru_cache(maxsize=2)
def _hashed(
    saved: SavedSet, test_fraction: float, *, _stamps: tuple[Stamp, ...]
) -> dict[Split, np.ndarray]:
    """Rows of each split by a hash of the image's path."""
    names: list[str | None] = []
    path = saved.columns.path
    if path:
        for chunk in saved.table()[path.removesuffix(".path")].chunks:
            names += chunk.field("path").to_pylist()
    expected = "a DatasetDict with a split test"
    return hashed_records(names, test_fraction, where=shown(saved.folder), expected=expected)
