"""Files, whoever reads them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content, read piece by piece."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def below(uri: str, name: str) -> str:
    """Folder ``name`` below a path, or below a URI, whose options
    (``?endpoint_override=minio:9000``) stay last.
    """
    place, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Makes the folder, mode 0700, and lets one process at a time work there; others wait."""
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.mkdir(exist_ok=True, mode=0o700)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
