"""``manifest.json``: SHA-256 and size of every file that a finished run left.

It is written last. A file that was changed, added or taken away since then is found by
:func:`faults`. Whoever can write the folder can write the manifest anew as well, together with all
that it lists: it is no signature. Against that stands its own digest, which the run prints and
logs: kept elsewhere, it is what ``sapf verify --manifest-digest`` compares.

Covered is every file but the manifest itself, locks and files that were not finished, and the
folders of :data:`APART`, which change when the run is over: later results have manifests of their
own, what is private or an audit's is never released.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sapf_ray import __version__
from sapf_ray.errors import RunDirectoryError, reason
from sapf_ray.files import file_digest, write_json
from sapf_ray.runs.directory import EVALUATION, SYNTHESIS, RunDirectory

APART = frozenset({"private", "spilled", "audit", SYNTHESIS, EVALUATION})
"""Folders of a run's own folder that its manifest does not cover."""
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a file was when the run ended.

    Attributes:
        sha256: Digest of its content, hex.
        size: Bytes.
    """

    sha256: str
    size: int


def write_manifest(directory: RunDirectory) -> str:
    """Lists all files as they are now.

    Returns:
        The manifest's own SHA-256, hex.
    """
    files = {}
    for name, path in covered(directory):
        files[name] = {"sha256": file_digest(path), "size": path.stat().st_size}
    content = {"schema": SCHEMA, "made_by": f"sapf-ray {__version__}", "files": files}
    write_json(directory.manifest, content)
    return file_digest(directory.manifest)


def read_manifest(directory: RunDirectory) -> dict[str, Entry]:
    """Path inside the folder to entry.

    Raises:
        RunDirectoryError: Missing, damaged, or of a later version.
    """
    path = directory.manifest
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise RunDirectoryError(
                f"{path}: schema {content['schema']!r}, this version reads up to {SCHEMA}"
            )
        return {str(name): Entry(**entry) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path}: gone, or the run was not finished by this version of sapf"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(f"{path}: damaged ({reason(error)})") from error


def faults(directory: RunDirectory) -> list[str]:
    """What is not as the manifest says, a few words for each file; empty where all is.

    Raises:
        RunDirectoryError: See :func:`read_manifest`.
    """
    listed = read_manifest(directory)
    there = dict(covered(directory))
    found = []
    for name, entry in listed.items():
        if name not in there:
            found.append(f"{name} is gone")
        elif there[name].stat().st_size != entry.size or file_digest(there[name]) != entry.sha256:
            found.append(f"{name} was changed")
    return found + [f"{name} was added" for name in there if name not in listed]


def covered(directory: RunDirectory) -> Iterator[tuple[str, Path]]:
    """Name inside the folder, and path, of each file that the manifest covers; sorted."""
    home = directory.home
    for path in sorted(home.rglob("*")):
        inside = path.relative_to(home)
        if path.is_dir() or inside.parts[0] in APART or path == directory.manifest:
            continue
        if path.suffix == ".partial" or path.name == ".lock":
            continue
        yield inside.as_posix(), path
