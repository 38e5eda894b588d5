"""A folder of images, one sub-folder per class, images of any size.

Layouts::

    root/cat/1.png  root/dog/7.jpg  …                    split by a hash of the relative path
    root/train/cat/1.png  …  root/test/cat/9.png  …      the split is given

or a list of the files, ``metadata.csv`` or ``.jsonl`` (``file_name,label[,split]``) in the folder
or in its split folders, or any CSV as ``data.path``. Splits may be called as people call them
(Train, training, val, valid, validation, testing); without a test set the validation set serves as
one. Hidden folders and what systems leave behind are no images; links are followed.

With the hash, which split an image belongs to depends on its own path only. Adding or removing one
image moves no other image between the splits, so that neighbouring data sets of the folder are
neighbouring training sets: the add/remove adjacency of the privacy analysis holds. A shuffle would
break it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import Grouping
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.decoding import check_depth, decode, opened, to_rgb
from sapf_ray.data.dicom import is_dicom, n_frames
from sapf_ray.data.file_lists import LIST_ENDINGS
from sapf_ray.data.files import prompts_of, stamp
from sapf_ray.data.findings import Findings, count_duplicates
from sapf_ray.data.guessing import hint
from sapf_ray.data.layouts import Listing, column_groups, list_records
from sapf_ray.data.packing import Names
from sapf_ray.data.path_groups import path_groups
from sapf_ray.data.pixels import PixelRange
from sapf_ray.data.record_source import Decoded, RecordSource, attempt
from sapf_ray.data.walking import shown
from sapf_ray.errors import ConfigError, DataError

_JPEG_END = b"\xff\xd9"
_FILES_PER_TASK = 256


@register("image_folder")
class ImageFolder(RecordSource):
    """Your own images, of any size.

    They become RGB (transparent ones over white), are resized by their shorter side and
    centre-cropped.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The folder is missing or not laid out as above; names the path.
    """

    def __init__(self, config: DataConfig) -> None:
        self.root = _root(config)
        self.heed(config)
        listing = _listed(self.root, config)
        self._given = self.root
        if self.root.is_file():
            self.root = self.root.parent
        self._notes = tuple(listing.notes)
        self._named = tuple(listing.named)
        self.class_names = listing.class_names
        self._paths = {split: Names(paths) for split, paths in listing.paths.items()}
        self._labels = {
            split: np.array(values, np.int32) for split, values in listing.labels.items()
        }
        self.prompts = prompts_of(self.class_names, config.prompt_template)
        self.n_train = len(self._paths["train"])
        self.n_test = len(self._paths["test"])

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        for row in rows:
            path = self.root / self._paths[split][row]
            yield attempt(partial(decode, path, resolution, pixel_range=self._pixel_range))

    def labels(self, split: Split) -> np.ndarray:
        return self._labels[split].astype(np.int64)

    def group_names(self, grouping: Grouping) -> Sequence[str]:
        paths = self._paths["train"]
        if grouping.by == "column":
            groups = column_groups(self._given, grouping.value)
            return [groups[path] for path in paths]
        return path_groups(paths, grouping, source=self.name, able="column, folder and pattern")

    def fingerprint(self) -> str:
        """Over class names, split, relative path, size and modification time of every image."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split, paths in self._paths.items():
            for path in paths:
                line = f"{split}\0{path}\0{_stamp_text(self.root / path)}\n"
                digest.update(os.fsencode(line))
        if self._pixel_range is not None:
            digest.update(f"pixel_range\0{self._pixel_range}".encode())
        if self.skips:
            digest.update(b"on_error\0skip")
        return digest.hexdigest()

    def notes(self) -> tuple[str, ...]:
        return self._notes

    def file_bytes(self) -> int:
        total = 0
        for paths in self._paths.values():
            for path in paths:
                with contextlib.suppress(OSError):  # a link to nothing: verify names it
                    total += (self.root / path).stat().st_size
        return total

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        """All faults: by headers and checksums, decoding only what has no cheaper check.

        Where they are skipped, every image is decoded, so that all are counted.
        """
        check = partial(_faults, pixel_range=self._pixel_range, whole=self.skips)
        faults: dict[Split, tuple[str, ...]] = {}
        read = []
        for split in splits:
            paths = [self.root / path for path in self._paths[split]]
            starts = range(0, len(paths), _FILES_PER_TASK)
            parts = [paths[start : start + _FILES_PER_TASK] for start in starts]
            with ThreadPoolExecutor() as pool:
                faults[split] = tuple(fault for part in pool.map(check, parts) for fault in part)
            if faults[split] and len(faults[split]) == len(paths):
                raise DataError(f"{faults[split][0]}; and no other image of the {split} split can")
            read += paths
        return Findings(
            faults=faults,
            duplicates=count_duplicates(read),
            several_frames=sum(map(_has_frames, read)),
            named=self._named,
        )


def _listed(root: Path, config: DataConfig) -> Listing:
    """As :func:`list_records`; a refusal says which other source it looks like."""
    try:
        return list_records(root, config)
    except DataError as error:
        raise DataError(f"{error}{hint(root)}") from error


def _root(config: DataConfig) -> Path:
    """``data.path``, an existing directory."""
    if config.path is None:
        allowed = "must be a directory with one sub-folder per class"
        raise ConfigError("data.path", None, allowed)
    root = Path(config.path).expanduser()
    if not root.exists():
        raise DataError(f"data.path = {config.path!r}: no such directory")
    if not root.is_dir() and root.suffix.lower() not in LIST_ENDINGS:
        raise DataError(
            f"data.path = {config.path!r}: not a directory; give the folder of the class "
            f"folders{hint(root)}"
        )
    return root.resolve()


def _stamp_text(path: Path) -> str:
    try:
        size, time = stamp(path)
    except DataError:
        return "gone"  # as a link to nothing is; verify names it
    return f"{size}\0{time}"


def _faults(paths: list[Path], *, pixel_range: PixelRange | None, whole: bool) -> list[str]:
    found = [_fault(path, pixel_range, whole=whole) for path in paths]
    return [fault for fault in found if fault]


def _fault(path: Path, pixel_range: PixelRange | None, *, whole: bool) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        if whole or is_dicom(path):
            decode(path, 8, pixel_range=pixel_range)
            return None
        with opened(path) as image:
            check_depth(image, pixel_range)
            if image.format == "PNG":
                image.verify()  # walks the chunks and their checksums
            elif image.format != "JPEG" or not _ends_as_jpeg(path):
                to_rgb(image, pixel_range)
    except DataError as error:
        return str(error)
    return None


def _has_frames(path: Path) -> bool:
    """Whether it is a DICOM file of several frames, of which the first is read."""
    try:
        return is_dicom(path) and n_frames(path, shown(str(path))) > 1
    except DataError:
        return False  # a fault, named as such


def _ends_as_jpeg(path: Path) -> bool:
    """Whether the end marker stands near the end; some writers pad behind it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 1024))
        return _JPEG_END in file.read()
