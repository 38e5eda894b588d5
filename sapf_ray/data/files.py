"""What the sources made of published files share: finding them, and sets of one file per image.

The index of such a set (paths and labels of up to 400,000 images) is no part of the source object:
it is made from the set's own small lists once per process, so a source pickles to a few hundred
bytes.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, ImageSource, Split, check_indices
from sapf_ray.data.catalog import KnownSet
from sapf_ray.data.decoding import decode
from sapf_ray.errors import ConfigError, DataError

VERIFY_SAMPLE = 1024
"""Number of images that ``verify`` decodes, evenly spread over a split.

The others are checked for presence and size only.
"""

Stamp = tuple[int, int]


def required_path(config: DataConfig, row: KnownSet) -> Path:
    """``data.path``, absolute and existing.

    Raises:
        ConfigError: Not given.
        DataError: There is nothing there.
    """
    if config.path is None:
        allowed = f"must be the {row.path}{row.obtain_hint}"
        raise ConfigError("data.path", None, allowed)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(
            f"data.path = {config.path!r}: no such file or directory; "
            f"expected the {row.path}{row.obtain_hint}"
        )
    return path.resolve()


def first_existing(
    root: Path,
    names: tuple[str, ...],
    *,
    row: KnownSet,
) -> Path:
    """The first of several places, relative to root, where a set's file or folder may be.

    Raises:
        DataError: None exists; names them.
    """
    for name in names:
        place = root / name
        if place.exists():
            return place
    places = " or ".join(names)
    raise DataError(f"{root}: no {places}; expected the {row.path}. {row.obtain}")


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
    if n == 0:
        return np.empty(0, np.int64)
    positions = np.linspace(0, n - 1, min(n, most))
    return np.unique(positions.astype(np.int64))


def check_labels(
    labels: np.ndarray,
    n_classes: int,
    *,
    where: object,
    obtain: str = "",
) -> np.ndarray:
    """``labels`` as an int64 vector.

    Args:
        labels: Integers of any type.
        n_classes: Number of classes.
        where: Where the labels are, for the message.
        obtain: How the set is obtained, for the message.

    Raises:
        DataError: One lies outside [0, n_classes).
    """
    labels = labels.astype(np.int64)
    if not labels.size:
        return labels
    low = labels.min()
    high = labels.max()
    if low < 0 or high >= n_classes:
        hint = f"; {obtain}" if obtain else ""
        raise DataError(
            f"{where}: labels must lie in [0, {n_classes}), found {low} to {high}{hint}"
        )
    return labels


def split_of(name: str, test_fraction: float) -> Split:
    """Split of a record where none is given: by a hash of its own name.

    Adding or removing one record moves no other between the splits, and neither does a copy to a
    system that writes accents otherwise (NFD).
    """
    composed = unicodedata.normalize("NFC", name)
    digest = hashlib.sha256(composed.encode(errors="surrogateescape")).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if draw < test_fraction else "train"


def prompts_of(class_names: tuple[str, ...], template: str) -> tuple[str, ...]:
    """One prompt per class: ``{name}`` in the template stands for the name, without underscores."""
    words = [name.replace("_", " ") for name in class_names]
    return tuple(template.replace("{name}", word) for word in words)


@dataclass(frozen=True)
class FileIndex:
    """Where the images of a set are.

    Attributes:
        paths: Per split, paths of the images relative to the set's root.
        labels: Per split, labels int64 in the same order.
    """

    paths: dict[Split, pa.StringArray] = field(default_factory=dict)
    labels: dict[Split, np.ndarray] = field(default_factory=dict)

    def add(
        self,
        split: Split,
        *,
        paths: pa.StringArray,
        labels: np.ndarray,
    ) -> None:
        self.paths[split] = paths
        self.labels[split] = labels


class ImageFiles(ImageSource):
    """Base of sets with one file per image, and with lists of paths, labels and splits.

    Opening reads the lists only. A subclass sets ``row``, ``root`` and ``lists``, calls
    :meth:`_read_names_and_sizes`, and gives :meth:`index`.

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
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        index = self._unchanged_index()
        paths = index.paths[split]
        indices = check_indices(indices, len(paths), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        for row, position in enumerate(indices):
            relative = paths[int(position)].as_py()
            images[row] = decode(self.root / relative, resolution)
        return images, index.labels[split][indices]

    def labels(self, split: Split) -> np.ndarray:
        return self._unchanged_index().labels[split].copy()

    def fingerprint(self) -> str:
        """Over the lists' content and every image's path, size and modification time."""
        digest = hashlib.sha256()
        for path in self.lists:
            content = hashlib.sha256(path.read_bytes())
            digest.update(content.digest())
        index = self._unchanged_index()
        for split in SPLITS:
            for relative, (size, mtime) in self._stats(index.paths[split]):
                line = f"{split}\0{relative}\0{size}\0{mtime}\n"
                digest.update(line.encode())
        return digest.hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Every image must be there and not empty; 1,024 per split are decoded, evenly spread.

        Each directory is listed once per split. An unreadable image outside the sample is found,
        and named, by ``read``.
        """
        index = self._unchanged_index()
        for split in splits:
            paths = index.paths[split]
            self._refuse_empty(paths)
            self._refuse_unreadable(paths)

    def check_published_sizes(self, total: int, published_total: int) -> None:
        """A set with the published number of records must have the published split as well.

        Subsets pass: their sizes are their own.

        Raises:
            DataError: Other sizes than published.
        """
        if total != published_total:
            return
        if self.n_train == self.row.n_train and self.n_test == self.row.n_test:
            return
        raise DataError(
            f"{self.lists[-1]}: {self.n_train} training and {self.n_test} test images, "
            f"published are {self.row.n_train} and {self.row.n_test}; {self.row.obtain}"
        )

    def _read_names_and_sizes(self) -> None:
        self.class_names = self.row.class_names
        self.prompts = self.row.prompts
        paths = self.index().paths
        self.n_train = len(paths["train"])
        self.n_test = len(paths["test"])

    def _unchanged_index(self) -> FileIndex:
        index = self.index()
        sizes = [len(index.paths[split]) for split in SPLITS]
        if sizes != [self.n_train, self.n_test]:
            raise DataError(
                f"{self.lists[-1]}: changed since the data set was opened; start the run again"
            )
        return index

    def _refuse_empty(self, paths: pa.StringArray) -> None:
        for relative, (size, _) in self._stats(paths):
            if size == 0:
                raise DataError(
                    f"{self.root / relative}: empty file; "
                    f"unpack {self.row.title} again ({self.row.url})"
                )

    def _refuse_unreadable(self, paths: pa.StringArray) -> None:
        positions = evenly_spread(len(paths))
        sample = [self.root / paths[int(i)].as_py() for i in positions]
        with ThreadPoolExecutor() as pool:
            faults = [fault for fault in pool.map(_fault, sample) if fault]
        if not faults:
            return
        more = f" (and {len(faults) - 1} more of {len(sample)})" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)

    def _stats(self, paths: pa.StringArray) -> Iterator[tuple[str, Stamp]]:
        """Pairs (relative path, (size, mtime)), sorted by path to list each directory once."""
        parent: str | None = None
        listing: dict[str, Stamp] = {}
        ordered = paths.take(pc.sort_indices(paths))
        for relative in ordered.to_pylist():
            folder, _, name = relative.rpartition("/")
            if folder != parent:
                parent = folder
                listing = _list(self.root / folder)
            if name not in listing:
                raise DataError(
                    f"{self.root / relative}: no such file, though {self.lists[0].name} "
                    f"lists it; {self.row.obtain}"
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
    listing = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    stat = entry.stat()
                    listing[entry.name] = (stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    return listing
