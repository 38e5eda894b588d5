"""IDX files, the format of MNIST and its kin: two zero bytes, a type, a rank, sizes, the array.

Source: http://yann.lecun.com/exdb/mnist ("The IDX file format"); sizes are big-endian. A ``.gz``
file is one deflated stream between a header and 8 bytes of CRC-32 and size (RFC 1952).
"""

from __future__ import annotations

import gzip
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sapf_ray.data.by_position import ArrayRows, Deflated, Stored, damage_named
from sapf_ray.data.files import Stamp
from sapf_ray.errors import DataError

_UINT8 = 0x08
_AT_A_TIME = 1 << 20  # bytes

# gzip: magic, method, flags; flags of the fields that may follow the 10 bytes
_GZIP_HEADER = struct.Struct("<2sBB6x")
_GZIP_TRAILER = struct.Struct("<II")
_HEADER_CRC = 2
_EXTRA = 4
_TEXTS = (8, 16)  # file name, comment


@lru_cache(maxsize=8)
def idx_rows(
    path: Path,
    rank: int,
    *,
    _stamp: Stamp,
) -> ArrayRows:
    """The rows of a file's array uint8; reads its header only.

    Args:
        path: The file, packed or not.
        rank: Number of axes that the array must have.

    Raises:
        DataError: Not an IDX file of bytes with so many axes, or cut off.
    """
    packed = path.suffix == ".gz"
    kind = ".gz" if packed else "IDX"
    skip = 4 + 4 * rank
    with damage_named(path, kind), path.open("rb") as file:
        content, size = _packed(file) if packed else _plain(file)
        header = content.read(file, 0, stop=skip)
    zeros, code, found = struct.unpack(">HBB", header[:4])
    if zeros or (code, found) != (_UINT8, rank):
        raise DataError(
            f"{path}: not an IDX file of bytes with {rank} axes; it begins with {header[:4].hex()}"
        )
    rows = ArrayRows(
        path=path,
        kind=kind,
        name=path.name,
        shape=struct.unpack(f">{rank}I", header[4:]),
        dtype=np.dtype(np.uint8),
        skip=skip,
        content=content,
    )
    if rows.n_bytes % 2**32 != size % 2**32:
        raise DataError(
            f"{path}: not a readable {kind} file (it is cut off: {size:,} bytes, its header "
            f"promises {rows.n_bytes:,}); fetch it again"
        )
    return rows


def check_idx(path: Path) -> None:
    """Inflates a packed file once, keeping nothing, against its CRC-32.

    Raises:
        DataError: It is damaged.
    """
    if path.suffix != ".gz":
        return  # its size was compared with its header's
    with damage_named(path, ".gz"), gzip.open(path) as file:
        while file.read(_AT_A_TIME):
            pass


def _plain(file: BinaryIO) -> tuple[Stored, int]:
    size = file.seek(0, 2)
    return Stored(0, size), size


def _packed(file: BinaryIO) -> tuple[Deflated, int]:
    """The stream, and the size (modulo 2^32) that the file's end gives for its content."""
    magic, method, flags = _GZIP_HEADER.unpack(file.read(_GZIP_HEADER.size))
    if magic != b"\x1f\x8b" or method != 8:
        raise gzip.BadGzipFile("not packed by gzip")
    if flags & _EXTRA:
        (length,) = struct.unpack("<H", file.read(2))
        file.seek(length, 1)
    for text in _TEXTS:
        if flags & text:
            while file.read(1) not in (b"\0", b""):
                pass
    if flags & _HEADER_CRC:
        file.seek(2, 1)
    start = file.tell()
    end = file.seek(-_GZIP_TRAILER.size, 2)
    _, size = _GZIP_TRAILER.unpack(file.read(_GZIP_TRAILER.size))
    return Deflated(start, end - start), size
