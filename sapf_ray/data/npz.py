"""Rows of an array inside an .npz file, without holding the array.

``np.load`` decodes a whole member of an .npz at its first use: 1.6 GB for OCTMNIST at 128 pixels.
Here a stored member is read by position. A deflated one (``np.savez_compressed``) has no positions,
so it is inflated as a stream that keeps nothing but a copy of the inflater's state every 8 MB of
output: about 45 kB each, so 9 MB for 1.6 GB. A later read starts from the nearest state before it.
Rows read in ascending order, as the shards of a Ray task are, cost one pass over the member per
process; a random row costs at most 8 MB of inflation once the pass is made. Nothing is written to
disk.
"""

from __future__ import annotations

import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from sapf_ray.data.files import Stamp
from sapf_ray.errors import DataError, reason

STATE_EVERY = 8 << 20  # bytes of output between two kept states

_INPUT = 1 << 16  # bytes of compressed input at a time
_OUTPUT = 1 << 20  # most bytes of output at a time, which bounds memory for very compressible data
_HEADER_BYTES = 30
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    struct.error,
    NotImplementedError,
)


@dataclass(kw_only=True)
class _State:
    """An inflater at one place.

    Attributes:
        out: Number of bytes it has given.
        fed: Number of compressed bytes it has taken.
        inflater: The inflater.
    """

    out: int
    fed: int
    inflater: zlib._Decompress

    def copy(self) -> _State:
        return _State(
            out=self.out,
            fed=self.fed,
            inflater=self.inflater.copy(),
        )


class _Stored:
    """Bytes of a stored member, by position."""

    def __init__(self, start: int, size: int) -> None:
        self._start = start
        self._size = size

    def read(
        self,
        file: BinaryIO,
        start: int,
        *,
        stop: int,
    ) -> bytes:
        if stop > self._size:
            raise EOFError("the member is cut off")
        file.seek(self._start + start)
        return file.read(stop - start)


class _Deflated:
    """Bytes of a deflated member, by position in its output."""

    def __init__(self, start: int, size: int) -> None:
        self._start = start
        self._size = size
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._states = [_State(out=0, fed=0, inflater=inflater)]
        self._cursor = self._states[0].copy()
        self._lock = threading.Lock()

    def read(
        self,
        file: BinaryIO,
        start: int,
        *,
        stop: int,
    ) -> bytes:
        with self._lock:
            state = self._nearest(start)
            parts = []
            while state.out < stop:
                before = state.out
                part = self._advance(file, state, stop=stop)
                if state.out > start:
                    skipped = max(start - before, 0)
                    parts.append(part[skipped:])
            self._cursor = state
            return b"".join(parts)

    def _nearest(self, start: int) -> _State:
        """The last known state from which ``start`` can be reached."""
        reachable = [state for state in self._states if state.out <= start]
        kept = max(reachable, key=lambda state: state.out)
        if kept.out <= self._cursor.out <= start:
            return self._cursor
        return kept.copy()

    def _advance(
        self,
        file: BinaryIO,
        state: _State,
        *,
        stop: int,
    ) -> bytes:
        """Further output up to ``stop``; states are kept at multiples of STATE_EVERY."""
        border = (state.out // STATE_EVERY + 1) * STATE_EVERY
        end = min(border, stop, state.out + _OUTPUT)
        part = self._inflate(file, state, most=end - state.out)
        if state.out == border and state.out > self._states[-1].out:
            self._states.append(state.copy())
        return part

    def _inflate(
        self,
        file: BinaryIO,
        state: _State,
        *,
        most: int,
    ) -> bytes:
        """1 to ``most`` further bytes of output."""
        while True:
            file.seek(self._start + state.fed)
            given = file.read(min(_INPUT, self._size - state.fed))
            part = state.inflater.decompress(given, most)
            unused = len(state.inflater.unconsumed_tail)
            state.fed += len(given) - unused
            if part:
                state.out += len(part)
                return part
            if state.inflater.eof or not given:
                raise EOFError("the member is cut off")


_READERS: dict[int, type[_Stored] | type[_Deflated]] = {
    zipfile.ZIP_STORED: _Stored,
    zipfile.ZIP_DEFLATED: _Deflated,
}


class NpzImages:
    """Rows of a uint8 array (N, H, W) or (N, H, W, 3) in an .npz file.

    Opening reads the array's header only.

    Attributes:
        path: The file.
        name: Name of the array.
        shape: Shape of the array.

    Raises:
        DataError: Missing member, other shape or type, not an .npz file.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        with _zip_errors(path), zipfile.ZipFile(path) as archive:
            info = _member(archive, path, name=name)
            with archive.open(info) as file:
                self.shape, fortran_order, dtype = _header(file)
                self._skip = file.tell()
        self._check_array(dtype, fortran_order=fortran_order)
        if self._skip + self.shape[0] * self.row_bytes != info.file_size:
            raise DataError(
                f"{path}: {name} has {info.file_size} bytes, "
                f"its header promises the shape {self.shape}"
            )
        reader = _READERS.get(info.compress_type)
        if reader is None:
            raise DataError(
                f"{path}: {name} is neither stored nor deflated; "
                "write it with numpy.savez_compressed"
            )
        self._bytes = reader(_content_start(path, info), info.compress_size)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:]))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W[, 3]) in the order of ``indices``.

        Memory is a few times that of the requested rows.

        Raises:
            DataError: The file is damaged there.
        """
        # ascending, since an inflater cannot go back
        wanted, places = np.unique(indices, return_inverse=True)
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        gaps = np.flatnonzero(np.diff(wanted) != 1)
        done = 0
        with _zip_errors(self.path), self.path.open("rb") as file:
            for run in np.split(wanted, gaps + 1):
                if len(run):
                    out[done : done + len(run)] = self._read_run(file, run)
                    done += len(run)
        return out[places]

    def _read_run(self, file: BinaryIO, run: np.ndarray) -> np.ndarray:
        """Consecutive rows."""
        start = self._skip + int(run[0]) * self.row_bytes
        stop = start + len(run) * self.row_bytes
        content = self._bytes.read(file, start, stop=stop)
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])

    def _check_array(self, dtype: np.dtype, *, fortran_order: bool) -> None:
        images = len(self.shape) in (3, 4) and self.shape[3:] in ((), (3,))
        if dtype == np.uint8 and images and not fortran_order:
            return
        raise DataError(
            f"{self.path}: {self.name} must be a C-ordered uint8 array (N, H, W) or "
            f"(N, H, W, 3), is {dtype} {self.shape}"
        )


@lru_cache(maxsize=4)
def npz_images(
    path: Path,
    name: str,
    *,
    _stamp: Stamp,
) -> NpzImages:
    """The member's rows, one object per process, so that its kept states serve every shard."""
    return NpzImages(path, name)


def npz_vector(path: Path, name: str) -> np.ndarray:
    """A whole small integer member of shape (N,) or (N, 1), as int64 (N,).

    Raises:
        DataError: Missing member, other shape or type, damaged.
    """
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        member = _member(archive, path, name=name)
        with archive.open(member) as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    is_vector = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)
    if values.dtype.kind not in "iu" or not is_vector:
        raise DataError(
            f"{path}: {name} must be integers of shape (N, 1), is {values.dtype} {values.shape}"
        )
    return values.reshape(-1).astype(np.int64)


def npz_checksums(path: Path) -> list[tuple[str, int, int]]:
    """(member, size, CRC-32) from the file's directory; reads no member."""
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return sorted((info.filename, info.file_size, info.CRC) for info in members)


def check_npz(path: Path, names: tuple[str, ...]) -> None:
    """Inflates the members once, keeping nothing, against their CRC-32.

    Raises:
        DataError: A member is damaged.
    """
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        for name in names:
            member = _member(archive, path, name=name)
            with archive.open(member) as file:
                while file.read(_OUTPUT):
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
    with _zip_errors(path), path.open("rb") as file:
        file.seek(info.header_offset)
        lengths = _LOCAL_HEADER.unpack(file.read(_HEADER_BYTES))
    return info.header_offset + _HEADER_BYTES + sum(lengths)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turns what a damaged zip file raises into a DataError that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(
            f"{path}: not a readable .npz file ({reason(error)}); fetch it again"
        ) from error
