"""Walking folders as people have them: links, hidden files, names in any encoding."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sapf_ray.data.dicom import is_dicom
from sapf_ray.data.formats import image_endings
from sapf_ray.errors import DataError

_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "@recycle", "lost+found"}
_JUNK |= {"$recycle.bin", "system volume information"}

Inode = tuple[int, int]


@dataclass(frozen=True)
class LeftOut:
    """What a walk met and did not take.

    Attributes:
        endings: Number of files that are no images, by ending.
        dangling: Links to nothing that may be folders.
    """

    endings: Counter[str] = field(default_factory=Counter)
    dangling: list[Path] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """One line for each kind, with numbers."""
        if self.endings:
            most = [f"{n:,} {ending}" for ending, n in self.endings.most_common(5)]
            more = ", …" if len(self.endings) > 5 else ""
            n = self.endings.total()
            yield f"{n:,} files are no images: {', '.join(most)}{more}"
        if self.dangling:
            yield f"{len(self.dangling):,} links lead to nothing"

    def named(self) -> list[str]:
        """Lines that name files: for the terminal only."""
        return [f"{shown(path)}: a link to nothing" for path in self.dangling[:5]]


def shown(path: Path | str) -> str:
    """A name as it can be printed on one line, whatever bytes it is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_text(name: str) -> str:
    """A file's name as text, composed (NFC); bytes that are not UTF-8 are taken as Latin-1."""
    raw = os.fsencode(name)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return unicodedata.normalize("NFC", text)


def is_junk(name: str) -> bool:
    """Whether a system or a program left it beside the images."""
    return name.startswith(".") or name.lower() in _JUNK


def folders(parent: Path) -> list[Path]:
    """Visible sub-folders, sorted by name.

    Raises:
        DataError: The folder cannot be listed.
    """
    return sorted(Path(entry.path) for entry in _entries(parent) if _is_dir(entry))


def images(folder: Path, left_out: LeftOut) -> list[Path]:
    """Image files at any depth, sorted; a link to nothing counts as the image it is named as.

    Links are followed; a folder is not entered from inside itself.

    Raises:
        DataError: A folder cannot be listed.
    """
    return sorted(_images(folder, left_out, above=frozenset()))


def _images(folder: Path, left_out: LeftOut, *, above: frozenset[Inode]) -> Iterator[Path]:
    inside = above | {_inode(folder)}
    for entry in _entries(folder):
        path = Path(entry.path)
        if _is_dir(entry):
            if _inode(path) not in inside:
                yield from _images(path, left_out, above=inside)
            continue
        dangling = entry.is_symlink() and not os.path.exists(path)
        if path.suffix.lower() in image_endings() and (dangling or path.is_file()):
            yield path
        elif dangling:
            left_out.dangling.append(path)
        elif path.is_file() and is_dicom(path):
            yield path
        else:
            left_out.endings[shown(path.suffix.lower()) or "without ending"] += 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_junk(entry.name)]
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _inode(path: Path) -> Inode:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
