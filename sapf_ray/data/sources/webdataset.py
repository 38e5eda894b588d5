"""WebDataset shards: tar files of images and labels.

``data.path`` is a folder of shards, or a pattern such as ``shards/imagenet-*.tar``. Which split a
shard is of, its name or a folder's says (``train-000000.tar``, ``test/0.tar``); without any for
test, all records are split by a hash of their key, which then must be unique. A sample has one
image and a label: ``.cls`` (an integer), ``.json`` (its key ``label``, ``cls``, …) or ``.txt`` (the
class's name). Integers are named by a file ``classnames.txt`` beside the shards, one name a line.

Shards are listed, not unpacked; :mod:`sapf_ray.data.tar_shards` says what is refused.
"""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.classes import labels_of_words
from sapf_ray.data.columns import hashed_records
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import required_path, stamp
from sapf_ray.data.layouts import ROLES
from sapf_ray.data.record_source import Decoded, RecordSource, attempt
from sapf_ray.data.table_source import TableLabels
from sapf_ray.data.tar_shards import Sample, read_image, samples
from sapf_ray.data.walking import is_junk, shown
from sapf_ray.errors import DataError, SapfError

CLASS_NAMES = "classnames.txt"

_MOST_WORDS = 1000
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the records of a home are.

    Attributes:
        shards: For each record, number of its shard, int32.
        places: (n, 2) offset and size of its image, int64.
        members: Names of the images' members.
    """

    shards: np.ndarray
    places: np.ndarray
    members: list[str]


def _index(found: list[tuple[int, Sample]]) -> Index:
    places = [(sample.offset, sample.size) for _, sample in found]
    return Index(
        shards=np.array([number for number, _ in found], np.int32),
        places=np.array(places, np.int64).reshape(-1, 2),
        members=[sample.member for _, sample in found],
    )


@register("webdataset")
class WebDataset(TableLabels, RecordSource):
    """Opening reads headers and labels, no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: There are no shards, or one is not as above; names it.
    """

    row = DATA_SETS["webdataset"]

    def __init__(self, config: DataConfig) -> None:
        self.heed(config)
        root, self.shards = _find_shards(config)
        found: dict[Split, list[tuple[int, Sample]]] = {}
        for home, paths in self.shards.items():
            listed = [(number, s) for number, path in enumerate(paths) for s in samples(path)]
            found[home] = listed
        self._stamps = {home: tuple(map(stamp, paths)) for home, paths in self.shards.items()}
        self._indices = {home: _index(members) for home, members in found.items()}
        names, self._labels = _labels(root, found)
        self._split: dict[Split, np.ndarray] | None = None
        if not self.shards["test"]:
            keys = [sample.key for _, sample in found["train"]]
            self._split = _hashed(root, keys, test_fraction=config.test_fraction)
        self.open_classes(config, names, where=root)

    def __getstate__(self) -> bytes:
        # a few bytes per record instead of a hundred
        return zlib.compress(pickle.dumps(self.__dict__))

    def __setstate__(self, packed: bytes) -> None:
        self.__dict__.update(pickle.loads(zlib.decompress(packed)))

    def own_labels(self, home: Split) -> np.ndarray:
        return self._labels[home]

    def split_rows(self, split: Split) -> tuple[Split, np.ndarray]:
        if self._split is not None:
            return "train", self._split[split]
        return split, np.arange(len(self._labels[split]))

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        home, records = self.records(split)
        for row in records[rows]:
            yield attempt(partial(self._image, home, int(row), resolution=resolution))

    def fingerprint(self) -> str:
        """Over class names and every shard's name, size, modification time and places."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in SPLITS:
            for path, when in zip(self.shards[split], self._stamps[split], strict=True):
                digest.update(os.fsencode(f"{split}\0{path.name}\0{when}\n"))
            digest.update(self._indices[split].places.tobytes())
        digest.update(repr((self._pixel_range, self.skips)).encode())
        return digest.hexdigest()

    def _image(
        self,
        home: Split,
        row: int,
        *,
        resolution: int,
    ) -> np.ndarray:
        index = self._indices[home]
        number = int(index.shards[row])
        path = self.shards[home][number]
        if stamp(path) != self._stamps[home][number]:
            raise SapfError(f"{shown(path)}: changed since it was listed; start the run again")
        offset, size = index.places[row].tolist()
        content = read_image(path, (offset, size))
        name = f"{shown(path)}, {shown(index.members[row])}"
        return decode(content, resolution, name=name, pixel_range=self._pixel_range)


def _find_shards(config: DataConfig) -> tuple[Path, dict[Split, tuple[Path, ...]]]:
    """The folder, and the shards of each home, sorted.

    Raises:
        DataError: There is none.
    """
    row = DATA_SETS["webdataset"]
    pattern = Path(config.path or "").expanduser()
    if config.path and not pattern.exists() and _PATTERN.search(config.path):
        files = sorted(Path(name).resolve() for name in glob.glob(str(pattern), recursive=True))
        root = pattern.parent
        while _PATTERN.search(str(root)):
            root = root.parent
        root = root.resolve()
    else:
        root = required_path(config, row)
        files = [root] if root.is_file() else sorted(root.rglob("*.tar"))
        root = root.parent if root.is_file() else root
    files = [path for path in files if path.is_file() and not is_junk(path.name)]
    if not files:
        raise DataError(f"{config.path}: no .tar files; expected the {row.path}")
    roles = [_role(path, root) for path in files]
    test_role = "test" if "test" in roles else "val"
    train = [path for path, role in zip(files, roles, strict=True) if role in ("train", None)]
    test = [path for path, role in zip(files, roles, strict=True) if role == test_role]
    if not train:
        raise DataError(f"{root}: no training shards among {len(files)} .tar files")
    return root, {"train": tuple(train), "test": tuple(test)}


def _role(path: Path, root: Path) -> str | None:
    """The split that a shard's name says, or the nearest folder's."""
    relative = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    for part in reversed((*relative.parts[:-1], relative.stem)):
        words = re.split(r"[^a-z]+", part.casefold())
        found = {ROLES[word] for word in words if word in ROLES}
        if len(found) == 1:
            return found.pop()
    return None


def _labels(
    root: Path, found: dict[Split, list[tuple[int, Sample]]]
) -> tuple[tuple[str, ...], dict[Split, np.ndarray]]:
    """Class names (none where labels are only numbered), and labels int64 per home."""
    texts = [sample.label for home in SPLITS for _, sample in found[home]]
    n_train = len(found["train"])
    named = root / CLASS_NAMES
    if all(text.isdecimal() for text in texts):
        names = _class_names(named) if named.is_file() else ()
        labels = _numbers(root, texts)
    else:
        names, own = labels_of_words(texts)
        if len(names) > min(_MOST_WORDS, len(texts) / 2):
            raise DataError(
                f"{root}: {len(names):,} different labels in {len(texts):,} samples: captions? "
                "Labels must name a class"
            )
        labels = own
    return names, {"train": labels[:n_train], "test": labels[n_train:]}


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)}: cannot be read ({type(error).__name__})") from error
    return tuple(line.strip() for line in lines if line.strip())


def _numbers(root: Path, texts: list[str]) -> np.ndarray:
    try:
        return np.array(list(map(int, texts)), np.int64)
    except (OverflowError, ValueError) as error:
        raise DataError(f"{root}: a label is too large; number the classes from 0") from error


def _hashed(
    root: Path,
    keys: list[str],
    *,
    test_fraction: float,
) -> dict[Split, np.ndarray]:
    if len(set(keys)) != len(keys):
        raise DataError(
            f"{root}: no test shards, and keys repeat, so that records cannot be split by them; "
            "expected shards called test-*.tar"
        )
    return hashed_records(keys, test_fraction, where=root, expected="shards called test-*.tar")
