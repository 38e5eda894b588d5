"""Arrays of an .npz file: headers, small arrays as a whole, images row by row.

``np.load`` decodes a whole member at its first use: 1.6 GB for OCTMNIST at 128 pixels. Here rows
are read as :mod:`sapf_ray.data.by_position` explains. Nothing is unpickled.
"""

from __future__ import annotations

import struct
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from sapf_ray.data.by_position import ArrayRows, Deflated, Stored, damage_named
from sapf_ray.data.files import Stamp
from sapf_ray.errors import DataError

_AT_A_TIME = 1 << 20  # bytes
_HEADER_BYTES = 30
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field

_READERS: dict[int, type[Stored] | type[Deflated]] = {
    zipfile.ZIP_STORED: Stored,
    zipfile.ZIP_DEFLATED: Deflated,
}


@lru_cache(maxsize=4)
def npz_rows(
    path: Path,
    name: str,
    *,
    _stamp: Stamp,
) -> ArrayRows:
    """The rows of an array, one object per process, so that its kept states serve every shard.

    Reads the array's header only.

    Raises:
        DataError: No such array, of Python objects, in Fortran order, not an .npz file.
    """
    with damage_named(path, ".npz"), zipfile.ZipFile(path) as archive:
        info = _member(archive, path, name=name)
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(file)
            skip = file.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which are not unpickled")
    if fortran_order and len(shape) > 1:
        raise DataError(f"{path}: {name} is in Fortran order; save numpy.ascontiguousarray({name})")
    reader = _READERS.get(info.compress_type)
    if reader is None:
        raise DataError(
            f"{path}: {name} is neither stored nor deflated; write it with numpy.savez_compressed"
        )
    rows = ArrayRows(
        path=path,
        kind=".npz",
        name=name,
        shape=shape or (0,),
        dtype=dtype,
        skip=skip,
        content=reader(_content_start(path, info), info.compress_size),
    )
    if rows.n_bytes != info.file_size:
        raise DataError(
            f"{path}: {name} has {info.file_size} bytes, its header promises the shape {shape}"
        )
    return rows


def npz_vector(path: Path, name: str) -> np.ndarray:
    """A whole small array of shape (N,) or (N, 1), as (N,) of its own type.

    Raises:
        DataError: No such array, other shape, of Python objects, damaged.
    """
    with damage_named(path, ".npz"), zipfile.ZipFile(path) as archive:
        member = _member(archive, path, name=name)
        with archive.open(member) as file:
            shape, _, dtype = _header(file)
        is_vector = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        if dtype.hasobject or not is_vector:
            raise DataError(f"{path}: {name} must be of shape (N,) or (N, 1), is {dtype} {shape}")
        with archive.open(member) as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    return values.reshape(-1)


def npz_integers(path: Path, name: str) -> np.ndarray:
    """As :func:`npz_vector`, int64.

    Raises:
        DataError: Not integers; or as there.
    """
    values = npz_vector(path, name)
    if values.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must be integers, is {values.dtype} {values.shape}")
    return values.astype(np.int64)


def npz_names(path: Path) -> tuple[str, ...]:
    """Names of the arrays, in the order of the file."""
    with damage_named(path, ".npz"), zipfile.ZipFile(path) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def npz_checksums(path: Path) -> list[tuple[str, int, int]]:
    """(member, size, CRC-32) from the file's directory; reads no member."""
    with damage_named(path, ".npz"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return sorted((info.filename, info.file_size, info.CRC) for info in members)


def check_npz(path: Path, names: tuple[str, ...]) -> None:
    """Inflates the members once, keeping nothing, against their CRC-32.

    Raises:
        DataError: A member is damaged.
    """
    with damage_named(path, ".npz"), zipfile.ZipFile(path) as archive:
        for name in names:
            member = _member(archive, path, name=name)
            with archive.open(member) as file:
                while file.read(_AT_A_TIME):
                    pass


def _member(
    archive: zipfile.ZipFile,
    path: Path,
    *,
    name: str,
) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        present = ", ".join(member.removesuffix(".npy") for member in archive.namelist())
        raise DataError(f"{path}: no array {name}; it has {present}") from None


def _content_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the file a member's bytes begin, behind its local header."""
    with damage_named(path, ".npz"), path.open("rb") as file:
        file.seek(info.header_offset)
        lengths = _LOCAL_HEADER.unpack(file.read(_HEADER_BYTES))
    return info.header_offset + _HEADER_BYTES + sum(lengths)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
