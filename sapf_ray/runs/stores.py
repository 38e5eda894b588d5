"""MLflow stores as people have them: probed in seconds, shown without passwords, their faults in
one line with the remedy.

MLflow itself tries a database that cannot be opened 15 times, for half an hour, and a server that
hangs for minutes; nobody should wait that long to learn of a mistyped address.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from sapf_ray.errors import TrackingError, reason

PROBE_SECONDS = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_REMEDIES = (
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|certificate verify failed",
        "its TLS certificate is not trusted here; set MLFLOW_TRACKING_SERVER_CERT_PATH to the "
        "file of its authority, or MLFLOW_TRACKING_INSECURE_TLS=true",
    ),
    (
        r"error code 40[137]\b|HTTP Error 40[137]\b|UNAUTHENTICATED|PERMISSION_DENIED|"
        r"password authentication failed",
        "it refuses these credentials; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (
        r"out-of-date database schema|Can't locate revision",
        "its tables are of another MLflow version; `mlflow db upgrade` if they are older, "
        "`pip install -U mlflow` if they are newer",
    ),
    (r"readonly database|Read-only file system|Permission denied", "it cannot be written"),
    (r"disk is full|No space left|Disk quota", "the disk is full; make room"),
    (
        r"database is locked|locking protocol",
        "it is locked, by another process or for want of locks on its file system (NFS); put it "
        "on a local disk",
    ),
    (r"file is not a database|file is encrypted", "it is a file, but no sqlite database"),
    (r"unable to open database file", "its folder must exist and be writable"),
    (r"No module named", "the database's driver is not installed"),
    (
        r"[Uu]nsupported URI|registered implementation|Invalid database|[Ii]nvalid.*URI",
        "must be sqlite:////folder/mlflow.db, http://host:5000, or a database's URI",
    ),
)
"""What an error says → what it means and what to do."""


def sqlite_uri(path: Path) -> str:
    """The address of a sqlite file, as MLflow takes it.

    Raises:
        TrackingError: The path holds a ``?``, which ends a file's name there, or a ``%`` with two
            digits, which stands for a letter.
    """
    text = str(path.resolve())
    if "?" in text or urllib.parse.unquote(text) != text:
        raise TrackingError(
            f"tracking.uri: the default store would be {text}, and MLflow takes the `?`, or the % "
            "with two digits, for something else; give a --tracking.uri or another --out, or "
            "--tracking.enabled false"
        )
    return f"sqlite:///{text}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite store; None for other stores and for those in memory.

    >>> sqlite_path("sqlite:////data/50% of #3/mlflow.db")
    PosixPath('/data/50% of #3/mlflow.db')
    """
    if not uri.startswith("sqlite:///"):
        return None
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    if name in ("", ":memory:") or name.startswith("file:"):
        return None
    return Path(urllib.parse.unquote(name))


def shown(uri: str) -> str:
    """The address without password and without the options that may hold one.

    >>> shown("postgresql://me:secret@db/mlflow?sslpassword=secret")
    'postgresql://me:***@db/mlflow?***'
    >>> shown("sqlite:////data/mlflow.db")
    'sqlite:////data/mlflow.db'
    """
    place, mark, _ = uri.partition("?")
    hidden = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", place)
    return f"{hidden}{mark}{'***' * bool(mark)}"


def why(error: BaseException, uri: str = "") -> str:
    """What went wrong with a store, and what mends it, on one line.

    Args:
        error: MLflow's, SQLAlchemy's, requests', sqlite's or the system's.
        uri: The store's address, which such an error may quote with its password.

    >>> why(sqlite3.OperationalError("attempt to write a readonly database"))
    'it cannot be written (attempt to write a readonly database)'
    """
    said = reason(error)
    if said.startswith("(raised as a result of"):  # SQLAlchemy's first line tells nothing
        said = reason(error, line=1)
    if uri:
        said = said.replace(uri, shown(uri))
    everything = f"{type(error).__name__} {error}"
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, everything):
            return f"{remedy} ({said})"
    return f"{type(error).__name__}: {said}"


def probe(uri: str) -> None:
    """Looks for a store that cannot serve, in seconds.

    Raises:
        TrackingError: It does not answer, or cannot be opened.
    """
    scheme = urllib.parse.urlsplit(uri).scheme.partition("+")[0] if ":" in uri else ""
    look: Callable[[str], None] | None = None
    if scheme in ("http", "https"):
        look = _probe_server
    elif scheme == "sqlite":
        look = _probe_sqlite
    elif scheme in _PORTS:
        look = _probe_database
    if look is None:
        return  # a folder, Databricks, a plugin's: MLflow knows
    try:
        look(uri)
    except (OSError, ValueError, sqlite3.Error, http.client.HTTPException) as error:
        raise unusable(uri, error) from error


def unusable(uri: str, error: BaseException) -> TrackingError:
    """The one line for a store that a run cannot start with."""
    return TrackingError(
        f"tracking.uri = {shown(uri)}: {why(error, uri)}; give another --tracking.uri, or run with "
        "--tracking.enabled false"
    )


def _probe_server(uri: str) -> None:
    """Something must answer; whether it takes our credentials and certificates, MLflow finds out,
    with settings of its own (MLFLOW_TRACKING_...).
    """
    parts = urllib.parse.urlsplit(uri)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    try:
        place = f"{plain.geturl().rstrip('/')}/health"
        urllib.request.urlopen(place, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return
        raise TrackingError(
            f"tracking.uri = {shown(uri)}: the MLflow server does not answer ({cause}); start it, "
            "give another --tracking.uri, or run with --tracking.enabled false"
        ) from error


def _probe_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        return
    if not path.parent.is_dir():  # MLflow would make it, wherever a mistyped path leads
        raise TrackingError(
            f"tracking.uri = {uri}: there is no folder {path.parent}; make it, or correct the path "
            "(four slashes begin an absolute one)"
        )
    with contextlib.closing(sqlite3.connect(path, timeout=PROBE_SECONDS)) as connection:
        connection.isolation_level = None
        connection.execute("PRAGMA schema_version")
        connection.execute("BEGIN IMMEDIATE")  # takes the lock that writing needs
        connection.execute("ROLLBACK")


def _probe_database(uri: str) -> None:
    parts = urllib.parse.urlsplit(uri)
    if not parts.hostname:
        return  # a socket of this machine
    port = parts.port or _PORTS[parts.scheme.partition("+")[0]]
    socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
