"""Members of WebDataset shards: where in each tar file a sample's image and label are.

Source: the WebDataset format (https://github.com/webdataset/webdataset, "The WebDataset Format"): a
sample is the members of one key, the name up to the first dot of its last part; the rest is the
member's kind. Shards are listed, never unpacked; members are read by position.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from sapf_ray.data.formats import image_endings
from sapf_ray.data.walking import is_junk, shown
from sapf_ray.errors import DataError, reason

LABEL_KINDS = ("cls", "json", "txt")
"""Kinds of members that hold a label, the first that is there counts."""

_JSON_KEYS = ("label", "cls", "class", "class_name", "target", "category")
_MOST_LABEL_BYTES = 1 << 20
_ZERO_BLOCK = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record of a shard.

    Attributes:
        member: Name of the image's member.
        key: Key of the sample.
        offset: Where in the file the image begins.
        size: Its number of bytes.
        label: The class, as a number or a word.
    """

    member: str
    key: str
    offset: int
    size: int
    label: str


def samples(path: Path) -> list[Sample]:
    """The samples of a shard, in its order; reads headers and labels, no image.

    Raises:
        DataError: Not a tar file, packed, cut off, a member that is no plain file or leads outside,
            a sample without image or label.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            listed = archive.getmembers()
            _check_end(path, file, start=archive.offset)
            found = [
                _sample(path, key, members=members, file=file)
                for key, members in _grouped(path, listed)
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown(path)}: {_why(path, error)}") from error
    if not found:
        raise DataError(f"{shown(path)}: no samples; expected 0001.jpg with 0001.cls, …")
    return found


def read_image(path: Path, sample_at: tuple[int, int]) -> bytes:
    """The bytes at an offset, so many as its size says.

    Raises:
        DataError: The file is gone or shorter.
    """
    offset, size = sample_at
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    if len(content) < size:
        raise DataError(f"{shown(path)}: is cut off; copy it again")
    return content


def _grouped(
    path: Path, listed: list[tarfile.TarInfo]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys with their members by kind; the members of a key follow one another."""
    current = ""
    members: dict[str, tarfile.TarInfo] = {}
    done: set[str] = set()
    for member in listed:
        if member.isdir():
            continue
        _check_safe(path, member)
        name = PurePosixPath(member.name)
        if any(is_junk(part) for part in name.parts):
            continue
        stem, _, kind = name.name.partition(".")
        key = (name.parent / stem).as_posix()
        if key != current:
            if members:
                yield current, members
            if key in done:
                raise DataError(f"{shown(path)}: members of {shown(key)} do not stand together")
            done.add(key)
            current = key
            members = {}
        if kind.lower() in members:
            raise DataError(f"{shown(path)}: {shown(member.name)} is there twice")
        members[kind.lower()] = member
    if members:
        yield current, members


def _check_safe(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    where = f"{shown(path)}: member {shown(member.name)}"
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{where} leads outside; such archives are refused")
    if not member.isreg() or member.issparse():
        raise DataError(f"{where} is a link or no plain file; such archives are refused")


def _sample(
    path: Path,
    key: str,
    *,
    members: dict[str, tarfile.TarInfo],
    file: BinaryIO,
) -> Sample:
    where = f"{shown(path)}: sample {shown(key)}"
    images = [kind for kind in members if f".{kind.rpartition('.')[2]}" in image_endings()]
    if len(images) != 1:
        kinds = ", ".join(sorted(members))
        raise DataError(f"{where} has {len(images)} images ({shown(kinds)}); it must have one")
    image = members[images[0]]
    return Sample(
        member=image.name,
        key=key,
        offset=image.offset_data,
        size=image.size,
        label=_label(where, members, file=file),
    )


def _label(
    where: str,
    members: dict[str, tarfile.TarInfo],
    *,
    file: BinaryIO,
) -> str:
    kind = next((kind for kind in LABEL_KINDS if kind in members), None)
    if kind is None:
        raise DataError(f"{where} has no label; expected a member .cls, .json or .txt")
    member = members[kind]
    if member.size > _MOST_LABEL_BYTES:
        raise DataError(f"{where}: .{kind} has {member.size:,} bytes, too many for a label")
    file.seek(member.offset_data)
    raw = file.read(member.size)
    try:
        text = raw.decode()
        label = _json_label(json.loads(text)) if kind == "json" else text.strip()
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: .{kind} holds no label ({reason(error)})") from error
    if not label:
        raise DataError(f"{where}: .{kind} is empty; it must hold a label")
    return label


def _json_label(content: Any) -> str:
    """The label of a .json member: the value itself, or that of a key called as usual."""
    if isinstance(content, dict):
        key = next((key for key in _JSON_KEYS if key in content), None)
        if key is None:
            raise ValueError(f"no key {' or '.join(_JSON_KEYS[:3])}")
        content = content[key]
    if isinstance(content, bool) or not isinstance(content, int | str):
        raise ValueError("must be an integer or a word")
    return str(content).strip()


def _check_end(
    path: Path,
    file: BinaryIO,
    *,
    start: int,
) -> None:
    """An archive ends in zeros; without them it is cut off, and what follows them is not listed."""
    file.seek(start)
    if file.read(tarfile.BLOCKSIZE) != _ZERO_BLOCK:
        raise DataError(f"{shown(path)}: is damaged or cut off, its end is missing; copy it again")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(
                f"{shown(path)}: something follows the archive's end; were two joined? "
                "Keep them as two files"
            )


def _why(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"\x1f\x8b":
        return "is packed, and images in it cannot be read by position; gunzip it first"
    if "unexpected end of data" in str(error):
        return "is cut off; copy it again"
    return f"not a readable tar file ({reason(error)}); copy it again"
