"""Sets of labelled images that are read a part at a time, however many there are.

A set lies on disk as plain pixels at the size of the comparison. Who trains reads batches in any
order, who extracts features reads them in order, and no process holds more than a batch. The files
are as sensitive as the images: mode 0600, in a folder of mode 0700, and removed by whoever named
the folder.

>>> import numpy as np
>>> pictures = InMemory(pixels=np.zeros((5, 8, 8, 3), np.uint8), labels=np.arange(5))
>>> [len(batch) for batch in pictures.batches(2)], pictures.side
([2, 2, 1], 8)
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sapf_ray.data.base import SKIPPED, ImageSource, Split
from sapf_ray.errors import DataError, reason
from sapf_ray.files import only_one, write_array

Labelled = tuple[np.ndarray, np.ndarray]
"""Images uint8 (n, R, R, 3) and labels int64 (n,)."""

BATCH = 64  # images that networks without gradients see together
_PART_BYTES = 2**23  # of decoded pixels on their way to the disk
_PIXELS = "pixels.bin"
_LABELS = "labels.npy"  # written last: where it is, the set is whole

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures(ABC):
    """Images uint8 (R, R, 3) and their labels.

    Attributes:
        labels: int64 (n,).
    """

    labels: np.ndarray

    @property
    @abstractmethod
    def side(self) -> int:
        """R in pixels."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images at positions int64 (k,), in any order: uint8 (k, R, R, 3)."""

    def batches(self, size: int = BATCH) -> Iterator[np.ndarray]:
        """All images in order, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.read(np.arange(start, min(start + size, len(self))))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemory(Pictures):
    """A few images, as an array.

    Attributes:
        pixels: uint8 (n, R, R, 3).
    """

    pixels: np.ndarray

    @property
    def side(self) -> int:
        return int(self.pixels.shape[1])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels[rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDisk(Pictures):
    """Images in a file.

    Attributes:
        path: Plain pixels, n times R x R x 3 bytes.
        resolution: R.
        owner: Lives as long as the pictures do: a temporary folder.
    """

    path: Path
    resolution: int
    owner: Any = None

    @property
    def side(self) -> int:
        return self.resolution

    def read(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, self.side, self.side, 3), np.uint8)
        # mapped anew each time: pages that were read do not stay in the process
        shape = (len(self), self.side, self.side, 3)
        return np.array(np.memmap(self.path, np.uint8, "r", shape=shape)[rows])


def store(folder: Path, parts: Callable[[], Iterable[Labelled]], *, side: int) -> OnDisk:
    """Writes a set of images once; whoever comes later, or waits, finds it there.

    Args:
        folder: For this set alone; made, mode 0700.
        parts: Makes the images uint8 (k, R, R, 3) and labels int64 (k,), part by part.
        side: R in pixels.

    Raises:
        DataError: The disk is full, and the like.
    """
    with only_one(folder):
        if not (folder / _LABELS).is_file():
            labels = _write(folder / _PIXELS, parts())
            write_array(folder / _LABELS, labels, mode=0o600)
    return OnDisk(labels=np.load(folder / _LABELS), path=folder / _PIXELS, resolution=side)


def _write(path: Path, parts: Iterable[Labelled]) -> np.ndarray:
    labels = [np.empty(0, np.int64)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for images, of_images in ahead(parts):
            try:
                file.write(np.ascontiguousarray(images).data)
            except OSError as error:
                raise DataError(f"{path}: images cannot be kept there ({reason(error)})") from error
            labels.append(of_images)
    return np.concatenate(labels)


def source_parts(
    source: ImageSource, split: Split, *, side: int, rows: np.ndarray | None = None
) -> Iterator[Labelled]:
    """Images of a source, part by part, without those that cannot be read.

    Args:
        source: The real images.
        split: ``train`` or ``test``.
        side: R in pixels.
        rows: Ascending positions within the split; all of them unless given.
    """
    if rows is None:
        rows = np.arange(source.n_train if split == "train" else source.n_test)
    size = part_size(side)
    for start in range(0, len(rows), size):
        images, labels = source.read(split, rows[start : start + size], resolution=side)
        readable = labels != SKIPPED
        yield (images, labels) if readable.all() else (images[readable], labels[readable])


def part_size(side: int) -> int:
    """Number of images of a side that are decoded together."""
    return max(1, _PART_BYTES // (3 * side * side))


def ahead(items: Iterable[T], *, most: int = 1) -> Iterator[T]:
    """The items, of which a thread makes the next while one is worked on.

    Args:
        items: Made one after the other.
        most: How many may wait.
    """
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(most)
    stopped = threading.Event()

    def put(item: tuple[bool, T | BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
