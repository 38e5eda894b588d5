"""Files, whoever reads them: written whole or not at all, recognised by their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from sapf_ray.locks import locked

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o666, replace: bool = True) -> Iterator[IO[bytes]]:
    """Yields a file that gets its name ``path`` only once it is whole and on disk.

    The file and the entry in its folder are both synchronised, so that neither is lost with the
    power. Any number of processes may write the same path: each writes a file of its own, and the
    last one to finish wins, or the first one where ``replace`` is False.

    Args:
        path: Where the file appears; its folder must exist.
        mode: Permissions, from the first byte on: less what the umask takes;
            0o600 for what is sensitive or secret.
        replace: False keeps a file that is already there.

    Raises:
        FileExistsError: ``replace`` is False and the file is already there.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _link(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Gives a whole file its name, unless the name is taken."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # no hard links there (exFAT, some of FUSE): as good where one process writes
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)


def write_atomic(
    path: Path, content: str | bytes, *, mode: int = 0o666, replace: bool = True
) -> None:
    """Writes text (UTF-8) or bytes through :func:`atomic_file`."""
    with atomic_file(path, mode=mode, replace=replace) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Writes a value as indented JSON through :func:`atomic_file`."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", mode=mode)


def write_array(path: Path, array: np.ndarray, *, mode: int = 0o666) -> None:
    """Writes a ``.npy`` file through :func:`atomic_file`."""
    import numpy as np  # this module is at the ground of the package and stays light

    with atomic_file(path, mode=mode) as file:
        np.save(file, array)


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries on disk: a new name may otherwise be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise  # some of FUSE and SMB cannot synchronise a folder
    finally:
        os.close(descriptor)


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def short_hash(value: Any, *, digits: int = 16) -> str:
    """The first hex digits of a JSON value's SHA-256: by default enough to tell folders apart.

    The order of a mapping's keys does not count.

    >>> short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def below(uri: str, name: str) -> str:
    """Folder ``name`` below a path, or below a URI, whose options
    (``?endpoint_override=minio:9000``) stay last.

    >>> below("s3://bucket/runs?scheme=http", "50 % of #3")
    's3://bucket/runs/50%20%25%20of%20%233?scheme=http'
    """
    if "://" not in uri:
        return f"{uri.rstrip('/')}/{name}"
    place, mark, options = uri.partition("?")
    return f"{place.rstrip('/')}/{quote(name)}{mark}{options}"


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Makes the folder, mode 0700, and lets one process at a time work there; others wait."""
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.mkdir(exist_ok=True, mode=0o700)
    with open(directory / ".lock", "w", encoding="utf-8") as lock, locked(lock):
        yield
