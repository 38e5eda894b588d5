"""Folders that ``datasets`` writes with ``save_to_disk``: which files they have, and their rows.

One data set: ``state.json`` (its ``_data_files``), ``dataset_info.json`` (its ``features``) and
Arrow files of the IPC stream format, which are mapped into memory. Several: ``dataset_dict.json``
names the sub-folders. Source: ``datasets.Dataset.save_to_disk``, ``datasets.arrow_writer``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from sapf_ray.data.columns import Columns, features_in, features_of, find_columns
from sapf_ray.data.files import Stamp, stamp
from sapf_ray.data.walking import shown
from sapf_ray.errors import DataError, reason

STATE = "state.json"
INFO = "dataset_info.json"
DICT = "dataset_dict.json"

_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream, since Arrow 0.15


@dataclass(frozen=True, kw_only=True)
class SavedSet:
    """One data set on disk.

    Attributes:
        folder: Its folder.
        files: Its Arrow files, in the order of the rows.
        columns: Its columns.
    """

    folder: Path
    files: tuple[Path, ...]
    columns: Columns

    def table(self) -> pa.Table:
        """All rows; mapped, so that only what is looked at is read.

        Raises:
            DataError: A file is missing, damaged or cut off.
        """
        parts = [_mapped(path, _stamp=stamp(path)) for path in self.files]
        try:
            return pa.concat_tables(parts)
        except pa.ArrowException as error:
            raise DataError(
                f"{shown(self.folder)}: its files have different columns ({reason(error)})"
            ) from error


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return (folder / STATE).is_file() or (folder / DICT).is_file()


def split_folders(root: Path) -> dict[str, Path]:
    """Name of each data set under a folder → its own folder; of a single one ``""``.

    Raises:
        DataError: Nothing that ``save_to_disk`` wrote.
    """
    if (root / STATE).is_file():
        return {"": root}
    names = _read_json(root / DICT).get("splits")
    if not isinstance(names, list):
        raise DataError(f"{shown(root / DICT)}: must have a list splits; save the set again")
    return {str(name): root / str(name) for name in names}


def open_saved(folder: Path) -> SavedSet:
    """The data set of one folder; reads its two JSON files and the schema.

    Raises:
        DataError: A file is missing or not as ``datasets`` writes it.
    """
    state = _read_json(folder / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{shown(folder)}: holds a selection of rows by an index; "
            "call flatten_indices() and save it again"
        )
    try:
        files = tuple(folder / str(row["filename"]) for row in state["_data_files"])
        info = _read_json(folder / INFO)
        features = features_in(info) if info.get("features") else {}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{shown(folder / STATE)}: not as datasets writes it ({reason(error)})"
        ) from error
    if not files:
        raise DataError(f"{shown(folder / STATE)}: names no data files")
    for path in files:
        if path.parent.resolve() != folder.resolve():
            raise DataError(f"{shown(folder / STATE)}: names {shown(path)}, which lies outside")
    schema = _mapped(files[0], _stamp=stamp(files[0])).schema
    columns = find_columns(schema, features or features_of(schema, files[0]), where=folder)
    return SavedSet(folder=folder, files=files, columns=columns)


@lru_cache(maxsize=512)
def _mapped(path: Path, *, _stamp: Stamp) -> pa.Table:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - len(_END), 0))
            if file.read() != _END:
                raise EOFError("it is cut off")
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(
            f"{shown(path)}: not a readable Arrow stream ({reason(error)}); copy it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: no such file; copy the data set again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown(path)}: must hold an object")
    return content
