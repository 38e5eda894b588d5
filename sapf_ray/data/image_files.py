"""Base of published sets with one file per image, and with lists of paths, labels and splits.

The index of such a set (paths and labels of up to 400,000 images) is no part of the source object:
it is made from the set's own small lists once per process, so a source pickles to a few hundred
bytes.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sapf_ray.data.base import SPLITS, Split
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import Stamp
from sapf_ray.data.findings import Findings
from sapf_ray.data.known_set import KnownSet
from sapf_ray.data.record_source import Decoded, RecordSource, attempt
from sapf_ray.errors import DataError


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


class ImageFiles(RecordSource):
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

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        paths = self._unchanged_index().paths[split]
        for row in rows.tolist():
            yield attempt(partial(decode, self.root / paths[row].as_py(), resolution))

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
        if self.skips:
            digest.update(b"on_error\0skip")
        return digest.hexdigest()

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        """Every image must be there and not empty; 1,024 per split are decoded, evenly spread.

        Each directory is listed once per split. An unreadable image outside the sample is found,
        and named, by ``read``. Where records are skipped, all are decoded instead.
        """
        if not self.skips:
            for split in splits:
                self._refuse_empty(self._unchanged_index().paths[split])
        return super().inspect(splits)

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
            if name not in listing and self.skips:
                yield relative, (0, 0)
            elif name not in listing:
                raise DataError(
                    f"{self.root / relative}: no such file, though {self.lists[0].name} "
                    f"lists it; {self.row.obtain}"
                )
            else:
                yield relative, listing[name]


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
