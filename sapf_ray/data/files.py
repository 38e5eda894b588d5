"""What the sources made of published files share: finding them, and sets of one file per image.

The index of such a set (paths and labels of up to 400,000 images) is no part of the source object:
it is made from the set's own small lists once per process, so a source pickles to a few hundred
bytes.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices
from sapf_ray.data.catalog import KnownSet
from sapf_ray.data.decoding import decode
from sapf_ray.errors import ConfigError, DataError

VERIFY_SAMPLE = 1024
"""Images that ``verify`` decodes, evenly spread over a split; the rest is checked for presence and size only."""

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")

Stamp = tuple[int, int]


def required_path(config: DataConfig, row: KnownSet) -> Path:
    """``data.path``, absolute and existing.

    Raises:
        ConfigError: Not given.
        DataError: There is nothing there.
    """
    if config.path is None:
        raise ConfigError(
            "data.path", None, f"must be the {row.path}" + (f"; {row.obtain}" if row.url else "")
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        hint = f"; {row.obtain}" if row.url else ""
        raise DataError(
            f"data.path = {config.path!r}: no such file or directory; expected the {row.path}{hint}"
        )
    return path.resolve()


def first_existing(root: Path, names: tuple[str, ...], *, row: KnownSet) -> Path:
    """The first of several places, relative to root, where a set's file or folder may be.

    Raises:
        DataError: None exists; names them.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise DataError(f"{root}: no {' or '.join(names)}; expected the {row.path}. {row.obtain}")


def stamp(path: Path) -> Stamp:
    """Size and modification time: keys of per-process caches, so that a changed file is read anew.

    Raises:
        DataError: The file is gone.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return stat.st_size, stat.st_mtime_ns


def evenly_spread(n: int, most: int = VERIFY_SAMPLE) -> np.ndarray:
    """At most ``most`` of the positions 0..n-1, first and last among them."""
    return (
        np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
        if n
        else np.empty(0, np.int64)
    )


def check_labels(
    labels: np.ndarray, n_classes: int, *, where: object, obtain: str = ""
) -> np.ndarray:
    """``labels`` as an int64 vector; ``where`` they are and how the set is obtained go into the
    message.

    Raises:
        DataError: One lies outside [0, n_classes).
    """
    labels = labels.astype(np.int64)
    if labels.size and (labels.min() < 0 or labels.max() >= n_classes):
        hint = f"; {obtain}" if obtain else ""
        raise DataError(
            f"{where}: labels must lie in [0, {n_classes}), found {labels.min()} to {labels.max()}{hint}"
        )
    return labels


def split_of(name: str, test_fraction: float) -> Split:
    """Split of a record where none is given: by a hash of its own name, so that adding or removing
    one record moves no other between the splits."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if draw < test_fraction else "train"


@dataclass(frozen=True)
class FileIndex:
    """Where the images of a set are.

    Attributes:
        paths: Per split, paths of the images relative to the set's root.
        labels: Per split, labels int64 in the same order.
    """

    paths: dict[Split, pa.StringArray]
    labels: dict[Split, np.ndarray]


class ImageFiles(ImageSource):
    """Base of sets with one file per image and lists that tell paths, labels and splits.

    Opening reads the lists only. A subclass sets ``root``, ``lists`` and the attributes of
    :class:`ImageSource`, and gives :meth:`index`.

    Attributes:
        row: What is published about the set.
        root: Absolute directory to which the index's paths are relative.
        lists: Absolute paths of the list files.
    """

    row: KnownSet
    root: Path
    lists: tuple[Path, ...]

    @abstractmethod
    def index(self) -> FileIndex:
        """The index, cached per process.

        Raises:
            DataError: A list is missing or not in the published format.
        """

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index = self._unchanged_index()
        indices = check_indices(indices, len(index.paths[split]), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        for row, i in enumerate(indices):
            images[row] = decode(self.root / index.paths[split][int(i)].as_py(), resolution)
        return images, index.labels[split][indices]

    def labels(self, split: Split) -> np.ndarray:
        return self._unchanged_index().labels[split].copy()

    def fingerprint(self) -> str:
        """Over the lists' content and every image's path, size and modification time."""
        digest = hashlib.sha256()
        for path in self.lists:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        index = self._unchanged_index()
        for split in SPLITS:
            for relative, (size, mtime) in self._stats(index.paths[split]):
                digest.update(f"{split}\0{relative}\0{size}\0{mtime}\n".encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Every image must be there and not empty; an evenly spread sample of 1,024 per split is
        decoded.

        Each directory is listed once per split. An unreadable image outside the sample is met, and
        named, by ``read``.
        """
        index = self._unchanged_index()
        for split in SPLITS:
            paths = index.paths[split]
            empty = next(
                (relative for relative, (size, _) in self._stats(paths) if size == 0), None
            )
            if empty is not None:
                raise DataError(
                    f"{self.root / empty}: empty file; unpack {self.row.title} again ({self.row.url})"
                )
            sample = [self.root / paths[int(i)].as_py() for i in evenly_spread(len(paths))]
            with ThreadPoolExecutor() as pool:
                faults = [found for found in pool.map(_fault, sample) if found]
            if faults:
                raise DataError(
                    faults[0]
                    + (f" (and {len(faults) - 1} more of {len(sample)})" if len(faults) > 1 else "")
                )

    def check_published_sizes(self, total: int, published_total: int) -> None:
        """A set with the published number of records must have the published split as well.

        Subsets pass: their sizes are their own.

        Raises:
            DataError: Other sizes than published.
        """
        found, published = (self.n_train, self.n_test), (self.row.n_train, self.row.n_test)
        if total == published_total and found != published:
            raise DataError(
                f"{self.lists[-1]}: {found[0]} training and {found[1]} test images, published are "
                f"{published[0]} and {published[1]}; {self.row.obtain}"
            )

    def _unchanged_index(self) -> FileIndex:
        index = self.index()
        if (len(index.paths["train"]), len(index.paths["test"])) != (self.n_train, self.n_test):
            raise DataError(
                f"{self.lists[-1]}: changed since the data set was opened; start the run again"
            )
        return index

    def _stats(self, paths: pa.StringArray) -> Iterator[tuple[str, Stamp]]:
        """Pairs (relative path, (size, mtime)), sorted by path, so that each directory is listed
        only once.
        """
        parent: str | None = None
        listing: dict[str, Stamp] = {}
        for relative in paths.take(pc.sort_indices(paths)).to_pylist():
            folder, _, name = relative.rpartition("/")
            if folder != parent:
                parent, listing = folder, _list(self.root / folder)
            if name not in listing:
                raise DataError(
                    f"{self.root / relative}: no such file, though {self.lists[0].name} lists it; {self.row.obtain}"
                )
            yield relative, listing[name]


def _fault(path: Path) -> str | None:
    """What is wrong with an image, or None."""
    try:
        decode(path, 8)
    except DataError as error:
        return str(error)
    return None


def _list(folder: Path) -> dict[str, Stamp]:
    try:
        with os.scandir(folder) as entries:
            return {
                e.name: (e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file()
            }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
