"""Rows of an array inside a file, without holding the array.

A stored array is read by position. A deflated one (a member of ``np.savez_compressed``, a ``.gz``
file) has no positions, so it is inflated as a stream that keeps nothing but a copy of the
inflater's state every 8 MB of output: about 45 kB each, so 9 MB for 1.6 GB. A later read starts
from the nearest state before it. Rows read in ascending order, as the shards of a Ray task are,
cost one pass over the array per process; a random row costs at most 8 MB of inflation once the
pass is made. Nothing is written to disk.
"""

from __future__ import annotations

import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sapf_ray.errors import DataError, reason

STATE_EVERY = 8 << 20  # bytes of output between two kept states

_INPUT = 1 << 16  # bytes of compressed input at a time
_OUTPUT = 1 << 20  # most bytes of output at a time, which bounds memory for very compressible data

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    struct.error,
    NotImplementedError,
)


@contextmanager
def damage_named(path: Path, kind: str) -> Iterator[None]:
    """Turns what a damaged file raises into a DataError that names it.

    Args:
        path: The file.
        kind: What it should be, such as ``.npz``.
    """
    try:
        yield
    except _DAMAGE as error:
        raise DataError(
            f"{path}: not a readable {kind} file ({reason(error)}); fetch it again"
        ) from error


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


class Stored:
    """Bytes of a stored array, by position."""

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
            raise EOFError("it is cut off")
        file.seek(self._start + start)
        return file.read(stop - start)


class Deflated:
    """Bytes of a deflated array, by position in its output."""

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
                raise EOFError("it is cut off")


@dataclass(frozen=True, kw_only=True)
class ArrayRows:
    """Rows of a C-ordered array inside a file.

    Attributes:
        path: The file.
        kind: What the file is, such as ``.npz``, for messages.
        name: What messages call the array.
        shape: Shape of the array; rows are along the first axis.
        dtype: Type of its items.
        skip: Number of bytes of its content before the first row.
        content: Where its bytes come from.
    """

    path: Path
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    skip: int
    content: Stored | Deflated

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the content, with what comes before the first row."""
        return self.skip + len(self) * self.row_bytes

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """(n, *shape[1:]) of the array's type, in the order of ``indices``.

        Memory is a few times that of the requested rows.

        Raises:
            DataError: The file is damaged there.
        """
        # ascending, since an inflater cannot go back
        wanted, places = np.unique(indices, return_inverse=True)
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        gaps = np.flatnonzero(np.diff(wanted) != 1)
        done = 0
        with damage_named(self.path, self.kind), self.path.open("rb") as file:
            for run in np.split(wanted, gaps + 1):
                if len(run):
                    out[done : done + len(run)] = self._read_run(file, run)
                    done += len(run)
        return out[places]

    def _read_run(self, file: BinaryIO, run: np.ndarray) -> np.ndarray:
        """Consecutive rows."""
        start = self.skip + int(run[0]) * self.row_bytes
        stop = start + len(run) * self.row_bytes
        content = self.content.read(file, start, stop=stop)
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])
