"""Locks between processes, also on file systems that have none.

``flock`` where it works. NFS without its lock service, FUSE and some cluster file systems refuse it
(ENOLCK, ENOTSUP, ...): there a file made with O_EXCL, which is atomic everywhere, stands for the
lock. It names its holder, so the lock of a process that died on this machine is taken over; of one
on another machine only a person can know.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sapf_ray.errors import RunDirectoryError

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What a file system without locks answers."""

WAIT_SECONDS = 120.0  # for a lock that is held for milliseconds, before its holder is named
_LOOK_SECONDS = 0.05


class Held(Exception):
    """Another process has the lock; the message says which, where that is known."""


@contextlib.contextmanager
def locked(
    file: IO[Any], *, exclusive: bool = True, patience: float | None = None
) -> Iterator[None]:
    """Waits for a file's lock and holds it.

    Args:
        file: An open file of the file system.
        exclusive: Whether nobody else may hold it; readers share it otherwise.
        patience: Seconds to wait where the file system has no locks; None: as long as it takes.

    Raises:
        RunDirectoryError: Another machine's process kept it for longer.
    """
    let_go = take(file, exclusive=exclusive, patience=patience, wait=True)
    try:
        yield
    finally:
        let_go()


def take(
    file: IO[Any], *, exclusive: bool = True, wait: bool, patience: float | None = None
) -> Callable[[], None]:
    """Takes a file's lock; returns what lets it go.

    Args:
        file: An open file of the file system.
        exclusive: Whether nobody else may hold it.
        wait: Whether to wait for another holder's end.
        patience: See :func:`locked`.

    Raises:
        Held: Another process has it, and ``wait`` is False.
        RunDirectoryError: See :func:`locked`.
    """
    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
        return lambda: fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        raise Held("") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    if not exclusive:
        return lambda: None  # readers know a line that is not whole yet
    return _take_by_file(Path(f"{file.name}.held"), wait=wait, patience=patience)


def works(folder: Path) -> bool:
    """Whether the folder's file system has locks; leaves nothing there.

    Raises:
        OSError: The folder cannot be written.
    """
    path = folder / f".lock-probe-{os.urandom(8).hex()}"
    try:
        with open(path, "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS or not path.exists():
            raise
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _take_by_file(path: Path, *, wait: bool, patience: float | None) -> Callable[[], None]:
    began = time.monotonic()
    me = _identity(os.getpid())
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder = _holder(path)
            if _is_dead(holder):
                _remove_stale(path, holder)
                continue
            if not wait:
                raise Held(_told(path, holder)) from None
            if patience is not None and time.monotonic() - began > patience:
                raise RunDirectoryError(_told(path, holder)) from None
            time.sleep(_LOOK_SECONDS)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(me, file)
        return lambda: path.unlink(missing_ok=True)


def _told(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return f"{path} is held by {who}; if no such process is there, delete that file"


def _identity(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "began": _began(pid)}


def _boot() -> str:
    """Changes with each start of the machine: its processes are all gone then."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When a process of this machine began, in ticks; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[19]


def _holder(path: Path) -> dict[str, Any]:
    """Who made the file; empty where it is gone, or not written yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not Path("/proc/self/stat").exists():
        return False
    if holder.get("boot") != _boot():
        return True
    return _began(int(holder["pid"])) != holder.get("began")


def _remove_stale(path: Path, holder: dict[str, Any]) -> None:
    """Removes a dead process's lock; of several that find it, one at a time looks again."""
    guard = path.with_name(f"{path.name}.stale")
    try:
        os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(OSError):  # left by a process that was killed right here
            if time.time() - guard.stat().st_mtime > WAIT_SECONDS:
                guard.unlink()
        return
    try:
        if _holder(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)
