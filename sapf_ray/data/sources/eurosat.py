"""EuroSAT (RGB): 27,000 Sentinel-2 patches of 64x64 pixels in ten classes of land use.

``data.path`` is the folder of the ten class folders (``EuroSAT_RGB``, or ``2750`` in the older
archive), the folder above it, or the archive itself, which is read without unpacking. No split is
published; a record is a test record by a hash of its class and file name, at the share
``data.test_fraction``.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.decoding import decode
from sapf_ray.data.files import Stamp, required_path, split_of, stamp
from sapf_ray.data.packing import Names
from sapf_ray.data.record_source import Decoded, RecordSource, attempt
from sapf_ray.data.walking import LeftOut, images, shown
from sapf_ray.errors import DataError, reason

_FOLDERS = ("EuroSAT_RGB", "2750", "eurosat/2750", "EuroSAT/2750", "EuroSAT")
_ARCHIVES = ("EuroSAT_RGB.zip", "EuroSAT.zip")


@register("eurosat")
class EuroSat(RecordSource):
    """Opening lists the files, or the archive's directory.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A class is missing, or the archive is damaged; names it.
    """

    row = DATA_SETS["eurosat"]

    def __init__(self, config: DataConfig) -> None:
        self.root = _root(required_path(config, self.row))
        self.heed(config)
        self.class_names = self.row.class_names
        self.prompts = self.row.prompts
        listed = _in_folder(self.root) if self.root.is_dir() else _in_archive(self.root)
        found = {PurePosixPath(name).parent.name for name in listed}
        missing = [name for name in self.class_names if name not in found]
        if missing:
            raise DataError(
                f"{shown(self.root)}: no images of {missing[0]}; expected the {self.row.path}. "
                f"{self.row.obtain}"
            )
        self._members: dict[Split, Names] = {split: Names() for split in SPLITS}
        for name in sorted(listed):
            own = "/".join(PurePosixPath(name).parts[-2:])
            self._members[split_of(own, config.test_fraction)].append(name)
        for split, members in self._members.items():
            if not members:
                raise DataError(f"{shown(self.root)}: no records in the {split} split")
        self.n_train = len(self._members["train"])
        self.n_test = len(self._members["test"])

    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        names = [self._members[split][row] for row in rows.tolist()]
        if self.root.is_dir():
            for name in names:
                yield attempt(partial(decode, self.root / name, resolution))
            return
        archive = _opened(self.root, _stamp=stamp(self.root))
        for name in names:
            yield attempt(partial(_from_archive, archive, name, resolution=resolution))

    def labels(self, split: Split) -> np.ndarray:
        numbers = {name: label for label, name in enumerate(self.class_names)}
        folders = [PurePosixPath(name).parent.name for name in self._members[split]]
        return np.array([numbers[name] for name in folders], np.int64)

    def fingerprint(self) -> str:
        """Over every image's name, size and modification time; the archive's directory."""
        digest = hashlib.sha256(b"skip" if self.skips else b"")
        if not self.root.is_dir():
            for info in _opened(self.root, _stamp=stamp(self.root)).infolist():
                digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\n".encode())
        for split in SPLITS:
            for name in self._members[split]:
                when = stamp(self.root / name) if self.root.is_dir() else ""
                digest.update(os.fsencode(f"{split}\0{name}\0{when}\n"))
        return digest.hexdigest()


def _root(path: Path) -> Path:
    """The folder of the class folders, or the archive."""
    if path.is_file() or (path / DATA_SETS["eurosat"].class_names[0]).is_dir():
        return path
    for name in _FOLDERS:
        if (path / name / DATA_SETS["eurosat"].class_names[0]).is_dir():
            return path / name
    for name in _ARCHIVES:
        if (path / name).is_file():
            return path / name
    return path


def _in_folder(root: Path) -> list[str]:
    """Names relative to the root."""
    left_out = LeftOut()
    found = []
    for name in DATA_SETS["eurosat"].class_names:
        if (root / name).is_dir():
            found += [path.relative_to(root).as_posix() for path in images(root / name, left_out)]
    return found


def _in_archive(path: Path) -> list[str]:
    classes = DATA_SETS["eurosat"].class_names
    archive = _opened(path, _stamp=stamp(path))
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    found = [name for name in names if PurePosixPath(name).parent.name in classes]
    bands = [name for name in found if name.lower().endswith((".tif", ".tiff"))]
    if bands:
        raise DataError(
            f"{shown(path)}: holds {shown(bands[0])}, all 13 bands; the RGB version is read, "
            f"{DATA_SETS['eurosat'].obtain}"
        )
    return [name for name in found if not PurePosixPath(name).name.startswith(".")]


@lru_cache(maxsize=2)
def _opened(path: Path, *, _stamp: Stamp) -> zipfile.ZipFile:
    """The archive, whose directory is read once per process; threads may share it."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{shown(path)}: not a readable .zip file ({reason(error)}); fetch it again"
        ) from error


def _from_archive(
    archive: zipfile.ZipFile,
    name: str,
    *,
    resolution: int,
) -> np.ndarray:
    where = f"{shown(str(archive.filename))}, {shown(name)}"
    try:
        content = archive.read(name)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise DataError(f"{where}: cannot be read ({reason(error)})") from error
    return decode(content, resolution, name=where)
