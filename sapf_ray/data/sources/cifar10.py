"""CIFAR-10 from the publisher's Python pickles.

``data.path`` is ``cifar-10-batches-py`` (``data_batch_1`` to ``data_batch_5``, ``test_batch``,
``batches.meta``) or the folder above it. Table 3 of the paper trains on 45,000 of the 50,000 images
and does not say on which; DPImageBench holds 5,000 out by ``torch.random_split`` with seed 0. Here
the first 45,000 in published order train, which no version of a random generator can change, and
the last 5,000 stay unused.

A pickle can run code, so a file is read by an unpickler that knows numpy arrays and plain
containers only. It skips the pixels and notes where in the file they are; ``read`` then maps just
the records asked for. So opening reads labels and counts, no image, and a process keeps 0.5 MB of
labels however many records it reads.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.catalog import CATALOG
from sapf_ray.data.decoding import decode_pixels
from sapf_ray.data.files import Stamp, check_labels, required_path, stamp
from sapf_ray.errors import DataError
from sapf_ray.files import file_digest

N_TRAIN = 45_000
RECORDS_PER_FILE = 10_000
RECORD_BYTES = 3 * 32 * 32  # red, green, blue plane, each row by row
_ROW = CATALOG["cifar10"]
_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"

# MD5 as published on the CIFAR page and checked by torchvision
_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_META = "batches.meta"
_FILES: dict[Split, tuple[str, ...]] = {"train": tuple(_MD5)[:5], "test": tuple(_MD5)[5:]}


@register("cifar10")
class Cifar10(ImageSource):
    """32x32 images in ten classes.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A file is missing or not in the published format; names it.
    """

    def __init__(self, config: DataConfig) -> None:
        self.root = _folder(required_path(config, _ROW))
        missing = [name for name in (*_MD5, _META) if not (self.root / name).is_file()]
        if missing:
            raise DataError(
                f"{self.root / missing[0]}: no such file; expected the {_ROW.path}. {_ROW.obtain}"
            )
        self.class_names, self.prompts = _ROW.class_names, _ROW.prompts
        self.n_train = min(N_TRAIN, sum(len(batch.labels) for batch in self._batches("train")))
        self.n_test = sum(len(batch.labels) for batch in self._batches("test"))
        for split, n in (("train", self.n_train), ("test", self.n_test)):
            if n == 0:
                raise DataError(f"{self.root}: no {split} images; {_ROW.obtain}")

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = check_indices(indices, self._n(split), split=split)
        batches = self._batches(split)
        ends = np.cumsum([len(batch.labels) for batch in batches])
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        maps: dict[int, np.ndarray] = {}
        for row, index in enumerate(indices):
            file = int(np.searchsorted(ends, index, side="right"))
            if file not in maps:
                maps[file] = batches[file].pixels()
            planes = maps[file][index - ends[file]]  # counted from the end of its file
            images[row] = decode_pixels(planes.reshape(3, 32, 32).transpose(1, 2, 0), resolution)
        return images, self.labels(split)[indices]

    def labels(self, split: Split) -> np.ndarray:
        return np.concatenate([batch.labels for batch in self._batches(split)])[: self._n(split)]

    def fingerprint(self) -> str:
        """Over the content of all batches."""
        return hashlib.sha256(
            "".join(file_digest(self.root / name, "sha256") for name in _MD5).encode()
        ).hexdigest()

    def verify(self) -> None:
        """Structure, class names, and, for files with the published 10,000 records, the published
        MD5.

        The structure was checked at opening: every image is whole, since raw pixels cannot be
        undecodable.
        """
        meta = _unpickle(self.root / _META)[0]
        names = (
            meta.get(b"label_names", meta.get("label_names")) if isinstance(meta, dict) else None
        )
        if not isinstance(names, list) or tuple(map(_text, names)) != _ROW.class_names:
            raise DataError(
                f"{self.root / _META}: label_names must be {', '.join(_ROW.class_names)}; {_ROW.obtain}"
            )
        for split, files in _FILES.items():
            for name, batch in zip(files, self._batches(split), strict=True):
                if (
                    len(batch.labels) == RECORDS_PER_FILE
                    and file_digest(self.root / name, "md5") != _MD5[name]
                ):
                    raise DataError(
                        f"{self.root / name}: damaged or altered, its MD5 is not the published {_MD5[name]}; {_ROW.obtain}"
                    )

    def _n(self, split: Split) -> int:
        return self.n_train if split == "train" else self.n_test

    def _batches(self, split: Split) -> list[_Batch]:
        return [_batch(self.root / name, stamp(self.root / name)) for name in _FILES[split]]


def _folder(path: Path) -> Path:
    """The folder of the batches, given it or the one above."""
    if (path / _FOLDER).is_dir():
        return path / _FOLDER
    archive = path if path.is_file() else path / _ARCHIVE
    if (
        archive.name.endswith((".tar.gz", ".tgz", ".tar"))
        and archive.is_file()
        and not (path / "test_batch").exists()
    ):
        raise DataError(
            f"{archive}: packed; unpack it first (tar xzf {archive.name}) and give the folder it makes"
        )
    if path.is_file():
        raise DataError(f"{path}: a file; data.path must be the {_ROW.path}. {_ROW.obtain}")
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
        shape = (len(self.labels), RECORD_BYTES)
        return np.memmap(
            self.path, np.uint8, "r", self.offset, shape, order="F" if self.by_column else "C"
        )


@lru_cache(maxsize=12)
def _batch(path: Path, _stamp: Stamp) -> _Batch:
    entry, skipped = _unpickle(path)
    if not isinstance(entry, dict):
        raise DataError(
            f"{path}: not a batch of CIFAR-10 (a dict with data and labels); {_ROW.obtain}"
        )
    data, labels = (entry.get(key.encode(), entry.get(key)) for key in ("data", "labels"))
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != RECORD_BYTES
    ):
        raise DataError(
            f"{path}: data must be a uint8 array of {RECORD_BYTES} bytes a record; {_ROW.obtain}"
        )
    if (
        not isinstance(labels, list)
        or not all(type(label) is int for label in labels)
        or len(labels) != len(data)
    ):
        raise DataError(
            f"{path}: labels must be a list of {len(data)} integers, one a record; {_ROW.obtain}"
        )
    values = check_labels(
        np.array(labels, np.int64), len(_ROW.class_names), where=path, obtain=_ROW.obtain
    )
    if not len(values):
        return _Batch(path=path, labels=values, offset=0, by_column=False)
    if list(skipped.values()) != [data.nbytes]:
        raise DataError(
            f"{path}: pixels are not stored as one string of bytes, as published; {_ROW.obtain}"
        )
    return _Batch(
        path=path, labels=values, offset=next(iter(skipped)), by_column=not data.flags.c_contiguous
    )


class _SkippingFile:
    """A file for an unpickler that jumps over pixels, giving zeros, and notes ``{offset: bytes}``
    of each jump.

    Pixels are the only item whose size is a multiple of 3,072 bytes; labels and file names are
    short. There is no ``peek`` nor ``readinto``, so the unpickler asks for each item by its size.
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


_ALLOWED = frozenset(
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for name in (("ndarray", "dtype") if module == "numpy" else ("_reconstruct",))
)


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays, containers, strings and numbers; anything else is refused before it is
    called.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no batch of CIFAR-10 does")
        return super().find_class(module, name)


def _unpickle(path: Path) -> tuple[Any, dict[int, int]]:
    """The object in a pickle, pixels left out, and the places of the pixels.

    Raises:
        DataError: Damaged, of a newer pickle protocol than published, or not made of plain data.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if len(head) < 2 or head[0] != 0x80 or head[1] > 3:
        # Newer protocols wrap items in frames, inside which pixels cannot be skipped.
        raise DataError(f"{path}: not a pickle of protocol 2 (as published) or 3; {_ROW.obtain}")
    try:
        with path.open("rb") as file:
            skipping = _SkippingFile(file)
            return _Unpickler(skipping, encoding="bytes").load(), skipping.skipped
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: not a readable batch of CIFAR-10 ({reason}); {_ROW.obtain}"
        ) from error


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
