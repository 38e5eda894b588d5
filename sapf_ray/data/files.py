"""What the sources share: finding their files, splits by a hash, prompts."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import Split
from sapf_ray.data.known_set import KnownSet
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
