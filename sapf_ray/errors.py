"""Errors a user can cause. Each is one line; the CLI prints it and exits with code 2."""

from __future__ import annotations

import errno


class SapfError(Exception):
    """Base class: the message is one line that says what is wrong and what to do."""


class ConfigError(SapfError):
    """A configuration value that cannot be used."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {value!r}: {allowed}")

    def __reduce__(
        self,
    ):  # Ray pickles exceptions; the default calls __init__ with the message only
        return type(self), (self.field, self.value, self.allowed)


class DataError(SapfError):
    """A data set or model file that is missing, unreadable or not in the expected format."""


class BudgetError(SapfError):
    """Going on would spend more privacy than was planned."""


class RunDirectoryError(SapfError):
    """The output directory cannot serve this run (other config, in use, damaged)."""


class TrackingError(SapfError):
    """The MLflow store cannot be reached or written."""


class ClusterError(SapfError):
    """The Ray cluster lacks what the run asks for."""


def reason(error: BaseException, *, line: int = 0) -> str:
    """What another library's error says, on one line; the error's class where it says nothing.

    Args:
        error: Any error.
        line: Which of the message's lines that are not blank: 0 is the first, -1 the last.

    >>> reason(ValueError("no such file\\n  in the folder"))
    'no such file'
    >>> reason(KeyError())
    'KeyError'
    """
    lines = [" ".join(text.split()) for text in str(error).splitlines()]
    said = [text for text in lines if text]
    return said[line][:300] if said else type(error).__name__


_FULL = "nothing is lost, the same command goes on when there is room"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: "correct the permissions, or use another place",
    errno.EPERM: "correct the permissions, or use another place",
    errno.EROFS: "the file system is read-only; use another place",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "one of these is a file where a folder is expected; use another place",
    errno.EIO: "the disk or its connection has a fault; check it, then the same command goes on",
    errno.ESTALE: "the network file system was lost; mount it again, then the same command goes on",
    errno.ENOTCONN: "the file system was lost; mount it again, then the same command goes on",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n 65536)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOLCK: "the file system has no locks; use another place",
    errno.EAGAIN: "too many processes or threads; raise the limit (ulimit -u)",
    errno.ENOMEM: "not enough memory; free some, or use fewer workers",
}
"""What the machine refuses → what to do."""


def is_environments(error: BaseException | None) -> bool:
    """Whether the machine refused something, as opposed to a fault of ours."""
    return isinstance(error, OSError) and error.errno in _REMEDIES


def remedy(error: OSError) -> str:
    """What to do where the machine refused something; see :func:`is_environments`.

    >>> remedy(OSError(errno.EROFS, "Read-only file system"))
    'the file system is read-only; use another place'
    """
    return _REMEDIES[error.errno or 0]
