"""A NumPy .npz file of your own: an array of images and one of labels for each split.

Arrays are called as people call them, in any case::

    train_images, train_labels, test_images, test_labels
    x_train, y_train, x_test, y_test
    images, labels (or x, y, or data, targets) in train.npz and test.npz, in one folder
    images, labels, ids

With ``ids`` (a name or number of one's own for each record), records are split by its hash; without
it the split must be given, since a record's position is no name: removing one would move all that
follow. ``val`` serves as test set where there is none. Images are uint8 (N, H, W), (N, H, W, C) or
(N, C, H, W) of one or three channels, or other numbers with ``data.pixel_range``. Labels are
integers or words; an array ``class_names`` names the integers. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.array_source import ArraySource
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.by_position import ArrayRows
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.classes import labels_of_words
from sapf_ray.data.columns import hashed_records
from sapf_ray.data.files import Stamp, required_path, stamp
from sapf_ray.data.npz import check_npz, npz_checksums, npz_names, npz_rows, npz_vector
from sapf_ray.data.table_source import TableLabels
from sapf_ray.errors import DataError

_IMAGES = ("images", "x", "data", "imgs", "image")
_LABELS = ("labels", "y", "targets", "label", "target")
_IDS = ("ids", "id", "names", "filenames", "paths")
_CLASS_NAMES = ("class_names", "classes", "label_names")
_ROLES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "valid")}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where the records of a split are.

    Attributes:
        path: The file.
        images: Array of the images.
        labels: Array of the labels.
        ids: Array of the records' names, where they are split by it.
    """

    path: Path
    images: str
    labels: str
    ids: str | None = None


@register("npz")
class Npz(TableLabels, ArraySource):
    """Opening reads headers and labels, no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The arrays are not as above; names the file.
    """

    row = DATA_SETS["npz"]
    takes_range = True

    def __init__(self, config: DataConfig) -> None:
        root = required_path(config, self.row)
        self.pixel_range = config.pixel_range
        self._test_fraction = config.test_fraction
        self.parts = _parts(root)
        for part in self.parts.values():
            self._check(part)
        self.open_classes(config, self._own_names(), where=root)

    def pixel_rows(self, split: Split) -> ArrayRows:
        part = self.parts[split if split in self.parts else "train"]
        return npz_rows(part.path, part.images, _stamp=stamp(part.path))

    def rows_of(self, split: Split) -> np.ndarray:
        return self.records(split)[1]

    def own_labels(self, home: Split) -> np.ndarray:
        if home not in self.parts:
            return np.empty(0, np.int64)
        return self._labels()[1][home]

    def split_rows(self, split: Split) -> tuple[Split, np.ndarray]:
        part = self.parts["train"]
        if part.ids is None:
            return split, np.arange(len(self.own_labels(split)))
        rows = _hashed(part, self._test_fraction, _stamp=stamp(part.path))
        return "train", rows[split]

    def fingerprint(self) -> str:
        """Over classes, and name, size and CRC-32 of every array."""
        digest = hashlib.sha256(repr((self.class_names, self.pixel_range)).encode())
        for path in self._paths():
            digest.update(repr(npz_checksums(path)).encode())
        return digest.hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Inflates the images once, keeping nothing, against their CRC-32."""
        for split in splits:
            part = self.parts.get(split, self.parts["train"])
            check_npz(part.path, (part.images,))

    def _check(self, part: Part) -> None:
        array = npz_rows(part.path, part.images, _stamp=stamp(part.path))
        self.check_pixels(array)
        n_labels = npz_rows(part.path, part.labels, _stamp=stamp(part.path)).shape[0]
        if n_labels != len(array):
            raise DataError(
                f"{part.path}: {len(array)} {part.images} and {n_labels} {part.labels}; "
                "every image must have one label"
            )

    def _paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(part.path for part in self.parts.values()))

    def _own_names(self) -> tuple[str, ...]:
        words, _ = self._labels()
        if words:
            return words
        for path in self._paths():
            name = _find(npz_names(path), _CLASS_NAMES)
            if name is not None:
                return tuple(map(str, npz_vector(path, name).tolist()))
        return ()

    def _labels(self) -> tuple[tuple[str, ...], dict[Split, np.ndarray]]:
        stamps = tuple(stamp(part.path) for part in self.parts.values())
        return _read_labels(tuple(self.parts.items()), _stamps=stamps)


def _parts(root: Path) -> dict[Split, Part]:
    """The arrays of each split; of ``train`` alone where records are split by their ids."""
    found: dict[Split, Part] = {}
    if root.is_dir():
        for split, roles in _ROLES.items():
            files = [root / f"{role}.npz" for role in roles]
            path = next((file for file in files if file.is_file()), None)
            if path is None:
                raise DataError(f"{root}: no {files[0].name}; expected the {DATA_SETS['npz'].path}")
            found[split] = _part(path, ("", *roles))
        return found
    names = npz_names(root)
    for split, roles in _ROLES.items():
        if any(_find(names, _IMAGES + _LABELS, role=role) for role in roles):
            found[split] = _part(root, roles)
    if "train" in found and "test" in found:
        return found
    part = _part(root, ("", *_ROLES["train"]))
    ids = _find(names, _IDS)
    if ids is None:
        raise DataError(
            f"{root}: no test images (it has {', '.join(names)}); add test_images and "
            "test_labels, or ids, one for each image, to split them by"
        )
    return {"train": Part(path=root, images=part.images, labels=part.labels, ids=ids)}


def _part(path: Path, roles: tuple[str, ...]) -> Part:
    names = npz_names(path)
    for role in roles:
        images = _find(names, _IMAGES, role=role)
        labels = _find(names, _LABELS, role=role)
        if images and labels:
            return Part(path=path, images=images, labels=labels)
    role = f"{roles[0]}_" if roles[0] else ""
    raise DataError(
        f"{path}: has the arrays {', '.join(names)}; expected {role}images and {role}labels"
    )


def _find(
    names: tuple[str, ...],
    words: tuple[str, ...],
    *,
    role: str = "",
) -> str | None:
    """The array that is called by a word, with the role before or after it."""
    lower = {name.lower(): name for name in reversed(names)}
    for word in words:
        called = (f"{role}_{word}", f"{word}_{role}") if role else (word,)
        for name in called:
            if name in lower:
                return lower[name]
    return None


@lru_cache(maxsize=2)
def _read_labels(
    parts: tuple[tuple[Split, Part], ...],
    *,
    _stamps: tuple[Stamp, ...],
) -> tuple[tuple[str, ...], dict[Split, np.ndarray]]:
    """Class names (none where labels are integers), and labels int64 per split."""
    vectors = {split: npz_vector(part.path, part.labels) for split, part in parts}
    for split, part in parts:
        values = vectors[split]
        if values.dtype.kind not in "iuU":
            raise DataError(
                f"{part.path}: {part.labels} must be integers or words, is {values.dtype}"
            )
    kinds = {values.dtype.kind == "U" for values in vectors.values()}
    if len(kinds) > 1:
        raise DataError(f"{parts[0][1].path}: labels are words in one split only")
    if kinds == {False}:
        return (), {split: values.astype(np.int64) for split, values in vectors.items()}
    names, labels = labels_of_words(np.concatenate(list(vectors.values())).tolist())
    ends = np.cumsum([len(values) for values in vectors.values()])
    return names, dict(zip(vectors, np.split(labels, ends[:-1]), strict=True))


@lru_cache(maxsize=2)
def _hashed(part: Part, test_fraction: float, *, _stamp: Stamp) -> dict[Split, np.ndarray]:
    assert part.ids is not None
    names = list(map(str, npz_vector(part.path, part.ids).tolist()))
    n_images = npz_rows(part.path, part.images, _stamp=_stamp).shape[0]
    if len(names) != n_images or len(set(names)) != n_images:
        raise DataError(f"{part.path}: {part.ids} must name each of {n_images} images differently")
    return hashed_records(names, test_fraction, where=part.path, expected="test_images")
