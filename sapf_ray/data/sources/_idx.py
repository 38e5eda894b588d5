"""MNIST and Fashion-MNIST from the publishers' four IDX files, packed (``.gz``) or not.

``data.path`` is the folder that holds them, or one in which torchvision has put them
(``MNIST/raw``, ``FashionMNIST/raw``). File names are the published ones, with ``-`` or ``.`` before
``idx3`` and ``idx1``. All 60,000 training images train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.array_source import ArraySource
from sapf_ray.data.base import SOURCES, SPLITS, Split
from sapf_ray.data.by_position import ArrayRows
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.files import Stamp, check_labels, required_path, stamp
from sapf_ray.data.idx import check_idx, idx_rows
from sapf_ray.data.known_set import KnownSet
from sapf_ray.errors import DataError
from sapf_ray.files import file_digest

_FOLDERS = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
_PARTS: dict[Split, str] = {"train": "train", "test": "t10k"}


class IdxSet(ArraySource):
    """28x28 grey images in ten classes. Opening reads headers and labels.

    Attributes:
        images: Per split, the file of the images.
        label_files: Per split, the file of the labels.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A file is missing or not in the published format; names it.
    """

    def __init__(self, config: DataConfig, name: str) -> None:
        self.name = name
        row = self.row
        root = required_path(config, row)
        folder = root / _FOLDERS[name]
        if folder.is_dir():
            root = folder
        self.images = {
            split: self._file(root, part, what="images") for split, part in _PARTS.items()
        }
        self.label_files = {
            split: self._file(root, part, what="labels") for split, part in _PARTS.items()
        }
        self.open_published(row)

    @property
    def row(self) -> KnownSet:
        return DATA_SETS[self.name]

    def pixel_rows(self, split: Split) -> ArrayRows:
        path = self.images[split]
        return idx_rows(path, 3, _stamp=stamp(path))

    def labels(self, split: Split) -> np.ndarray:
        path = self.label_files[split]
        return _labels(path, row=self.row, _stamp=stamp(path)).copy()

    def fingerprint(self) -> str:
        """Over the content of the four files."""
        paths = (*self.images.values(), *self.label_files.values())
        digests = [file_digest(path, "sha256") for path in paths]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Packed files against their CRC-32; of others, the size was checked at opening."""
        self.check_published_test(self.row)
        for split in splits:
            check_idx(self.images[split])

    def _file(
        self,
        root: Path,
        part: str,
        *,
        what: str,
    ) -> Path:
        rank = {"images": 3, "labels": 1}[what]
        stem = f"{part}-{what}"
        names = [f"{stem}{mark}idx{rank}-ubyte" for mark in "-."]
        for name in (*names, *(f"{name}.gz" for name in names)):
            if (root / name).is_file():
                return root / name
        raise DataError(
            f"{root}: no {names[0]} or {names[0]}.gz; expected the {self.row.path}. "
            f"{self.row.obtain}"
        )


@lru_cache(maxsize=4)
def _labels(
    path: Path,
    *,
    row: KnownSet,
    _stamp: Stamp,
) -> np.ndarray:
    array = idx_rows(path, 1, _stamp=_stamp)
    values = array.rows(np.arange(len(array)))
    return check_labels(values, len(row.class_names), where=path, obtain=row.obtain)


for _name in _FOLDERS:
    SOURCES[_name] = partial(IdxSet, name=_name)
