"""CIFAR-10 and CIFAR-100 from the publisher's Python pickles.

``data.path`` is ``cifar-10-batches-py`` (``data_batch_1`` to ``data_batch_5``, ``test_batch``,
``batches.meta``) or ``cifar-100-python`` (``train``, ``test``, ``meta``), or the folder above it.
Table 3 of the paper trains on 45,000 of the 50,000 images of CIFAR-10 and does not say on which;
DPImageBench holds 5,000 out by ``torch.random_split`` with seed 0. Here the first 45,000 in
published order train, which no version of a random generator can change, and the last 5,000 stay
unused. Of CIFAR-100 all 50,000 train, under 100 fine or 20 coarse labels.

A pickle can run code, so a file is read by an unpickler that knows numpy arrays and plain
containers only. It skips the pixels and notes where in the file they are; ``read`` then maps just
the requested records. So opening reads labels and counts, no image, and a process keeps 0.5 MB of
labels however many records it reads.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SOURCES, SPLITS, ImageSource, Split, check_indices
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.decoding import decode_pixels
from sapf_ray.data.files import Stamp, check_labels, required_path, stamp
from sapf_ray.data.known_set import KnownSet
from sapf_ray.errors import DataError, reason
from sapf_ray.files import file_digest

RECORD_BYTES = 3 * 32 * 32  # red, green, blue plane, each row by row

_PACKED = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one of the sets is published.

    Attributes:
        folder: The folder that its archive holds.
        archive: The archive.
        files: Per split, its files and their MD5 as published on the CIFAR page.
        n_per_file: Per split, number of records of each file.
        meta: The file of the class names.
        labels_key: Where in a file the labels are.
        names_key: Where in ``meta`` the class names are.
    """

    folder: str
    archive: str
    files: dict[Split, dict[str, str]]
    n_per_file: dict[Split, int]
    meta: str
    labels_key: str
    names_key: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for files in self.files.values() for name in files)


def _cifar100(kind: str) -> Layout:
    return Layout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        files={
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        n_per_file={"train": 50_000, "test": 10_000},
        meta="meta",
        labels_key=f"{kind}_labels",
        names_key=f"{kind}_label_names",
    )


LAYOUTS = {
    "cifar10": Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        files={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        n_per_file={"train": 10_000, "test": 10_000},
        meta="batches.meta",
        labels_key="labels",
        names_key="label_names",
    ),
    "cifar100": _cifar100("fine"),
    "cifar100_coarse": _cifar100("coarse"),
}
"""Source name → layout."""


class Cifar(ImageSource):
    """32x32 images.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A file is missing or not in the published format; names it.
    """

    def __init__(self, config: DataConfig, name: str) -> None:
        self.name = name
        row = self.row
        self.root = _folder(required_path(config, row), row, layout=self.layout)
        for file in (*self.layout.names, self.layout.meta):
            path = self.root / file
            if not path.is_file():
                raise DataError(f"{path}: no such file; expected the {row.path}. {row.obtain}")
        self.class_names = row.class_names
        self.prompts = row.prompts
        most = row.n_train
        assert most is not None, "published"
        self.n_train = min(most, self._count("train"))
        self.n_test = self._count("test")

    @property
    def row(self) -> KnownSet:
        return DATA_SETS[self.name]

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name]

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labels(split)
        indices = check_indices(indices, len(labels), split=split)
        batches = self._batches(split)
        ends = np.cumsum([len(batch.labels) for batch in batches])
        files = np.searchsorted(ends, indices, side="right")
        maps = {file: batches[file].pixels() for file in np.unique(files)}
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        for row, (file, index) in enumerate(zip(files, indices, strict=True)):
            planes = maps[file][index - ends[file]]  # counted from the end of its file
            pixels = planes.reshape(3, 32, 32).transpose(1, 2, 0)
            images[row] = decode_pixels(pixels, resolution)
        return images, labels[indices]

    def labels(self, split: Split) -> np.ndarray:
        labels = np.concatenate([batch.labels for batch in self._batches(split)])
        return labels[: self.n_train] if split == "train" else labels

    def fingerprint(self) -> str:
        """Hex digest over the content of all batches."""
        digests = [file_digest(self.root / name, "sha256") for name in self.layout.names]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Checks class names, and, of files with the published number of records, their MD5.

        The structure was checked at opening: every image is whole, since raw pixels cannot be
        undecodable.
        """
        self._check_class_names()
        for split in splits:
            for batch in self._batches(split):
                if len(batch.labels) == self.layout.n_per_file[split]:
                    self._check_md5(batch, self.layout.files[split][batch.path.name])

    def _check_class_names(self) -> None:
        path = self.root / self.layout.meta
        meta, _ = _unpickle(path, self.row)
        key = self.layout.names_key
        names = _entry(meta, key)
        if isinstance(names, list) and tuple(map(_text, names)) == self.row.class_names:
            return
        expected = ", ".join(self.row.class_names[:10])
        more = ", …" if len(self.row.class_names) > 10 else ""
        raise DataError(f"{path}: {key} must be {expected}{more}; {self.row.obtain}")

    def _check_md5(self, batch: _Batch, published: str) -> None:
        if file_digest(batch.path, "md5") != published:
            raise DataError(
                f"{batch.path}: damaged or altered, its MD5 is not the published {published}; "
                f"{self.row.obtain}"
            )

    def _count(self, split: Split) -> int:
        n = sum(len(batch.labels) for batch in self._batches(split))
        if n == 0:
            raise DataError(f"{self.root}: no {split} images; {self.row.obtain}")
        return n

    def _batches(self, split: Split) -> list[_Batch]:
        paths = [self.root / name for name in self.layout.files[split]]
        key = self.layout.labels_key
        return [_batch(path, key, row=self.row, _stamp=stamp(path)) for path in paths]


def _folder(
    path: Path,
    row: KnownSet,
    *,
    layout: Layout,
) -> Path:
    """The folder of the batches, given it or the one above."""
    if (path / layout.folder).is_dir():
        return path / layout.folder
    archive = path if path.is_file() else path / layout.archive
    packed = archive.is_file() and archive.name.endswith(_PACKED)
    if packed and not (path / layout.names[-1]).exists():
        raise DataError(
            f"{archive}: packed; unpack it first (tar xzf {archive.name}) and give the folder "
            "it makes"
        )
    if path.is_file():
        raise DataError(f"{path}: a file; data.path must be the {row.path}. {row.obtain}")
    return path


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One file: labels int64 (n,), and where its pixels uint8 (n, 3072) are."""

    path: Path
    labels: np.ndarray
    offset: int
    by_column: bool

    def pixels(self) -> np.ndarray:
        """Read-only map of the file; only the records that are looked at are read."""
        return np.memmap(
            self.path,
            dtype=np.uint8,
            mode="r",
            offset=self.offset,
            shape=(len(self.labels), RECORD_BYTES),
            order="F" if self.by_column else "C",
        )


@lru_cache(maxsize=12)
def _batch(
    path: Path,
    labels_key: str,
    *,
    row: KnownSet,
    _stamp: Stamp,
) -> _Batch:
    content, skipped = _unpickle(path, row)
    data = _check_data(_entry(content, "data"), path=path, row=row)
    found = _entry(content, labels_key)
    labels = _check_batch_labels(found, len(data), key=labels_key, path=path, row=row)
    if not len(labels):
        return _Batch(
            path=path,
            labels=labels,
            offset=0,
            by_column=False,
        )
    if list(skipped.values()) != [data.nbytes]:
        raise DataError(
            f"{path}: pixels are not stored as one string of bytes, as published; {row.obtain}"
        )
    (offset,) = skipped
    by_column = not data.flags.c_contiguous
    return _Batch(
        path=path,
        labels=labels,
        offset=offset,
        by_column=by_column,
    )


def _check_data(
    data: Any,
    *,
    path: Path,
    row: KnownSet,
) -> np.ndarray:
    records = isinstance(data, np.ndarray) and data.ndim == 2
    if records and data.dtype == np.uint8 and data.shape[1] == RECORD_BYTES:
        return data
    raise DataError(
        f"{path}: not a batch of {row.title}: data must be a uint8 array of {RECORD_BYTES} bytes "
        f"a record; {row.obtain}"
    )


def _check_batch_labels(
    labels: Any,
    n: int,
    *,
    key: str,
    path: Path,
    row: KnownSet,
) -> np.ndarray:
    integers = isinstance(labels, list) and all(type(label) is int for label in labels)
    if not integers or len(labels) != n:
        raise DataError(f"{path}: {key} must be a list of {n} integers, one a record; {row.obtain}")
    values = np.array(labels, np.int64)
    return check_labels(values, len(row.class_names), where=path, obtain=row.obtain)


def _entry(content: object, key: str) -> Any:
    """One entry of a dict whose keys are byte strings, as Python 2 wrote them, or strings."""
    if not isinstance(content, dict):
        return None
    return content.get(key.encode(), content.get(key))


class _SkippingFile:
    """A file for an unpickler that jumps over pixels and gives zeros in their place.

    Pixels are the only item whose size is a multiple of 3,072 bytes; labels and file names are
    short. There is no ``peek`` nor ``readinto``, so the unpickler requests each item by its size.

    Attributes:
        skipped: Offset → number of bytes of each jump.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.skipped: dict[int, int] = {}
        self.readline = file.readline
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def read(self, n: int) -> bytes:
        if n < RECORD_BYTES or n % RECORD_BYTES:
            return self._file.read(n)
        at = self._file.tell()
        if at + n > self._size:
            raise EOFError("the file is cut off")
        self._file.seek(n, os.SEEK_CUR)
        self.skipped[at] = n
        return bytes(n)


_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays, containers, strings and numbers.

    Anything else is refused before it is called.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no batch of CIFAR does")
        return super().find_class(module, name)


def _unpickle(path: Path, row: KnownSet) -> tuple[Any, dict[int, int]]:
    """The object in a pickle, pixels left out, and the places of the pixels.

    Raises:
        DataError: Damaged, of a newer pickle protocol than published, or not made of plain data.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if len(head) < 2 or head[0] != 0x80 or head[1] > 3:
        # Newer protocols wrap items in frames, inside which pixels cannot be skipped.
        raise DataError(f"{path}: not a pickle of protocol 2 (as published) or 3; {row.obtain}")
    try:
        with path.open("rb") as file:
            skipping = _SkippingFile(file)
            content = _Unpickler(skipping, encoding="bytes").load()
            return content, skipping.skipped
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{path}: not a readable batch of {row.title} ({reason(error)}); {row.obtain}"
        ) from error


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


for _name in LAYOUTS:
    SOURCES[_name] = partial(Cifar, name=_name)
