"""What a look at the sensitive files found, before any budget is spent.

All of it tells of the images without noise: it is for the terminal of whoever owns them, not for
logs, except what the privacy card states.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sapf_ray.errors import DataError

Split = Literal["train", "test"]

_MOST_ROWS = 50


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of the splits that were looked at.

    Attributes:
        faults: Per split, one line for each record that cannot be read.
        duplicates: Number of files whose content another one has, too.
        several_frames: Number of files with several frames, of which the first is read.
        named: Further lines that name files.
    """

    faults: Mapping[Split, tuple[str, ...]]
    duplicates: int = 0
    several_frames: int = 0
    named: tuple[str, ...] = ()

    @property
    def n_faults(self) -> int:
        return sum(map(len, self.faults.values()))

    def stop(self) -> None:
        """Refuses records that cannot be read.

        Raises:
            DataError: Names the first, and counts the others.
        """
        lines = [line for lines in self.faults.values() for line in lines]
        if lines:
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise DataError(lines[0] + more)

    def report(self) -> list[str]:
        """Lines for the terminal; none where nothing was found."""
        lines = []
        if self.n_faults:
            lines.append(f"{self.n_faults:,} images cannot be read:")
        for split, faults in self.faults.items():
            lines += [f"  {split:5}  {fault}" for fault in faults]
        hidden = len(lines) - 1 - _MOST_ROWS
        if hidden > 0:
            lines[_MOST_ROWS + 1 :] = [f"  … and {hidden:,} more"]
        if self.duplicates:
            lines.append(
                f"{self.duplicates:,} files repeat another one; who is in the set k times is "
                "protected at k times ε"
            )
        if self.several_frames:
            lines.append(f"{self.several_frames:,} files have several frames; the first is read")
        return lines + list(self.named)


def count_duplicates(paths: Iterable[Path]) -> int:
    """Number of files with the content of an earlier one; only files of equal size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(path)
    alike: Counter[bytes] = Counter()
    for members in by_size.values():
        if len(members) > 1:
            alike.update(_digest(path) for path in members)
    return sum(n - 1 for n in alike.values())


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return str(path).encode(errors="surrogateescape")  # unreadable: a fault, no duplicate
