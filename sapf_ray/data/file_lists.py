"""Lists of image files with labels: ``metadata.csv``, ``metadata.jsonl``, or a CSV of one's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config.groups import KEY
from sapf_ray.data.walking import as_text, shown
from sapf_ray.errors import ConfigError, DataError, reason

LIST_ENDINGS = (".csv", ".tsv", ".jsonl")

_FILE = ("file_name", "file", "filename", "path", "image", "image_path", "filepath")
_LABEL = ("label", "labels", "class", "target", "category")
_SPLIT = ("split", "partition", "set")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record of a list.

    Attributes:
        file: Absolute path.
        label: Class as text.
        split: What the list says of the split; None for nothing.
        list: The list.
        line: Line of the list.
        group: What the column of groups says, where one is asked for.
    """

    file: Path
    label: str
    split: str | None
    list: Path
    line: int
    group: str = ""

    @property
    def where(self) -> str:
        return f"{self.list}, line {self.line}"


def find_lists(root: Path, parts: list[Path]) -> list[Path]:
    """``metadata.csv`` or ``.jsonl`` of the folder, else of its split folders; with labels only."""
    for places in ([root], parts):
        found = [place / f"metadata{ending}" for place in places for ending in LIST_ENDINGS]
        labelled = [path for path in found if path.is_file() and _has_labels(path)]
        if labelled:
            return labelled
    return []


def read_list(path: Path, *, groups: str | None = None) -> list[Row]:
    """The rows of a list.

    Args:
        path: The list.
        groups: Column that says whose an image is, if that is asked for.

    Raises:
        ConfigError: No such column of groups.
        DataError: No file or label column, or an empty cell; names the line.
    """
    rows = []
    for line, cells in _cells(path):
        where = f"{shown(path)}, line {line}"
        file = cells[_column(path, cells, _FILE)]
        label = cells[_column(path, cells, _LABEL)]
        for what, text in (("file", file), ("label", label)):
            if not text.strip():
                raise DataError(f"{where}: no {what}; fill it in or delete the row")
        file = file.strip()
        split = next((cells[name] for name in _SPLIT if cells.get(name)), None)
        rows.append(
            Row(
                file=path.parent / file,
                label=as_text(label.strip()),
                split=split,
                list=path,
                line=line,
                group=_group(cells, groups, where=where, list_name=path.name) if groups else "",
            )
        )
    if not rows:
        raise DataError(f"{shown(path)}: no rows; expected one per image")
    return rows


def _group(cells: dict[str, str], column: str, *, where: str, list_name: str) -> str:
    group = cells.get(column.lower())
    if group is None:
        raise ConfigError(
            KEY,
            f"column:{column}",
            f"must name a column of {shown(list_name)}; it has {', '.join(cells)}",
        )
    if not group.strip():
        raise DataError(f"{where}: no {column}; {KEY} needs one in every row")
    return group.strip()


def _has_labels(path: Path) -> bool:
    first = next(_cells(path), None)
    return first is not None and any(name in first[1] for name in _LABEL)


def _column(path: Path, cells: dict[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if name in cells:
            return name
    raise DataError(f"{shown(path)}: columns are {', '.join(cells)}; one must be called {names[0]}")


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column, in lower case."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield line, _texts(json.loads(text))
                return
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=delimiter), [])
            reader = csv.DictReader(file, [n.strip().lower() for n in names], delimiter=delimiter)
            for cells in reader:
                yield reader.line_num + 1, _texts(cells)
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise DataError(
            f"{shown(path)}: not a list of files that can be read ({reason(error)})"
        ) from error


def _texts(cells: dict[object, object]) -> dict[str, str]:
    named = {str(name).lower(): value for name, value in cells.items() if name is not None}
    return {name: "" if value is None else str(value) for name, value in named.items()}
