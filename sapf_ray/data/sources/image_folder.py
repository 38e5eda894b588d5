"""A folder of images, one sub-folder per class, images of any size.

Two layouts::

    root/cat/1.png  root/dog/7.jpg  …                    split by a hash of the relative path
    root/train/cat/1.png  …  root/test/cat/9.png  …      the split is given

With the hash, which split an image belongs to depends on its own path only. Adding or removing one
image moves no other image between the splits, so that neighbouring data sets of the folder are
neighbouring training sets: the add/remove adjacency of the privacy analysis holds. A shuffle would
break it.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, check_indices, register
from sapf_ray.data.decoding import UNREADABLE, decode, unreadable_message
from sapf_ray.data.files import split_of
from sapf_ray.errors import ConfigError, DataError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})

_JPEG_END = b"\xff\xd9"


@register("image_folder")
class ImageFolder(ImageSource):
    """Images become RGB (transparent ones over white), are resized by their shorter side and
    centre-cropped.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: The folder is missing or not laid out as above; names the path.
    """

    def __init__(self, config: DataConfig) -> None:
        if config.path is None:
            raise ConfigError(
                "data.path", None, "must be a directory with one sub-folder per class"
            )
        root = Path(config.path).expanduser()
        if not root.exists():
            raise DataError(f"data.path = {config.path!r}: no such directory")
        if not root.is_dir():
            raise DataError(
                f"data.path = {config.path!r}: not a directory; give the folder of the class folders"
            )
        self.root = root.resolve()
        self.class_names, self._paths, self._labels = _list(self.root, config.test_fraction)
        self.prompts = tuple(
            config.prompt_template.replace("{name}", name.replace("_", " "))
            for name in self.class_names
        )
        self.n_train, self.n_test = len(self._paths["train"]), len(self._paths["test"])

    def __getstate__(self) -> dict[str, Any]:
        # File names are most of the object and repeat themselves: packed, 160,000 of them are
        # about 0.4 MB.
        packed = {
            split: zlib.compress("\0".join(paths).encode()) for split, paths in self._paths.items()
        }
        return {**self.__dict__, "_paths": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpacked = {k: zlib.decompress(v).decode().split("\0") for k, v in state["_paths"].items()}
        self.__dict__.update(state, _paths=unpacked)

    def read(
        self, split: Split, indices: np.ndarray, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        paths = self._paths[split]
        indices = check_indices(indices, len(paths), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            images[row] = decode(self.root / paths[index], resolution)
        return images, self.labels(split)[indices]

    def labels(self, split: Split) -> np.ndarray:
        return self._labels[split].astype(np.int64)

    def fingerprint(self) -> str:
        """Over class names, split, relative path, size and modification time of every image."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split, paths in self._paths.items():
            for path in paths:
                stat = (self.root / path).stat()
                digest.update(f"{split}\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Checks headers and checksums; decodes only what its format gives no cheaper check for."""
        paths = [self.root / path for split in self._paths.values() for path in split]
        parts = [paths[i : i + 256] for i in range(0, len(paths), 256)]
        with ThreadPoolExecutor() as pool:
            faults = [fault for part in pool.map(_faults, parts) for fault in part]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise DataError(faults[0] + more)


def _list(
    root: Path, test_fraction: float
) -> tuple[tuple[str, ...], dict[str, list[str]], dict[str, np.ndarray]]:
    """Class names, then per split the sorted paths relative to root and their labels (int32)."""
    given = all((root / split).is_dir() and _folders(root / split) for split in ("train", "test"))
    parents = {split: root / split if given else root for split in ("train", "test")}
    classes = _folders(parents["train"])
    if not classes:
        raise DataError(f"{root}: no class sub-folders; expected one folder of images per class")
    if len(classes) == 1:
        raise DataError(
            f"{parents['train']}: only one class ({classes[0]}); at least two sub-folders are needed"
        )
    if given and (differing := set(classes) ^ set(_folders(parents["test"]))):
        raise DataError(
            f"{root}: train/ and test/ must hold the same classes; only one has {', '.join(sorted(differing))}"
        )

    paths: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for parent in dict.fromkeys(parents.values()):
        for label, name in enumerate(classes):
            files = _images(parent / name)
            if not files:
                endings = " ".join(sorted(EXTENSIONS))
                raise DataError(
                    f"{parent / name}: class without images; expected files ending in {endings}"
                )
            for file in files:
                relative = file.relative_to(root).as_posix()
                split = parent.name if given else split_of(relative, test_fraction)
                paths[split].append(relative)
                labels[split].append(label)
    for split, members in paths.items():
        if not members:
            raise DataError(
                f"{root}: too few images, none falls into the {split} split at data.test_fraction = {test_fraction}"
            )
    return (
        tuple(classes),
        paths,
        {split: np.array(values, np.int32) for split, values in labels.items()},
    )


def _folders(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
    )


def _faults(paths: list[Path]) -> list[str]:
    return [fault for fault in map(_fault, paths) if fault]


def _fault(path: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.verify()  # walks the chunks and their checksums
            elif image.format != "JPEG" or not _ends_as_jpeg(path):
                image.load()
    except UNREADABLE as error:
        return unreadable_message(str(path), error)
    return None


def _ends_as_jpeg(path: Path) -> bool:
    """Whether the end marker stands near the end; some writers pad behind it."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
        return _JPEG_END in file.read()
