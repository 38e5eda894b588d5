"""What a machine must have for a run: small questions, each answered at once, nothing left behind.

:func:`temporary_folder` is asked before Ray starts; ``sapf doctor`` asks them all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapf_ray import locks
from sapf_ray.errors import ClusterError

SOCKET_BYTES = 107  # of a Unix socket's path, set by Linux
# ray/session_2026-11-25_17-24-55_123456_1234567/sockets/plasma_store
_RAY_BYTES = 68
# Ray takes the path of a spilled object for a URL, and does not find it again.
_NOT_SPILLED_TO = frozenset("#?\t\r\n")


def ray_folder() -> Path:
    """Where Ray puts its sessions, as Ray chooses it: RAY_TMPDIR, TMPDIR, /tmp."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def temporary_folder() -> Path:
    """The folder of Ray's sessions, if Ray can use it.

    Raises:
        ClusterError: It is not there, cannot be written, or its name is too long for sockets; names
            the variable that set it.
    """
    folder = ray_folder()
    setting = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "TMPDIR")
    field = f"{setting} = {str(folder)!r}"
    length = len(os.fsencode(folder.absolute()))
    if length + _RAY_BYTES > SOCKET_BYTES:
        raise ClusterError(
            f"{field}: {length} bytes are too long, Ray's sockets below it have room for "
            f"{SOCKET_BYTES - _RAY_BYTES}; set RAY_TMPDIR to a shorter folder, e.g. RAY_TMPDIR=/tmp"
        )
    fault = unwritable(folder)
    if fault is not None:
        raise ClusterError(
            f"{field}: {fault}; Ray needs a temporary folder: make it, or set RAY_TMPDIR=/tmp"
        )
    return folder


def unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder; None where one can."""
    try:
        if not folder.exists():
            return "no such folder"
        if not folder.is_dir():
            return "is a file, must be a folder"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return None


def has_locks(folder: Path) -> bool:
    """Whether processes can lock files there; without, files named ``*.held`` stand for locks.

    Raises:
        OSError: The folder cannot be written.
    """
    return locks.works(folder)


def ensure_token_place() -> None:
    """Lets a local Ray start where the home directory cannot be written.

    Ray keeps the token of its local sessions in ``~/.ray/auth_token``; without such a place the
    token is this process's, and its children inherit it.
    """
    home = os.environ.get("HOME")
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    if home is not None and (Path(home) / ".ray" / "auth_token").is_file():
        return
    if home is None or unwritable(Path(home)) is not None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def spilling(folder: Path | None) -> Iterator[dict[str, Any]]:
    """Options of ``ray.init`` for a spilling folder of this user's, for as long as it is needed."""
    if folder is None or _NOT_SPILLED_TO & set(str(folder.resolve())):
        yield {}
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield {"object_spilling_directory": str(folder.resolve())}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
