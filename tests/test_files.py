"""Files that are whole or not there, and errors on one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from sapf_ray.errors import reason
from sapf_ray.files import atomic_file, short_hash, write_array, write_atomic, write_json


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half of the ne")
        raise RuntimeError("killed")
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_name_appears_after_content_and_the_folder_are_synchronised(tmp_path, monkeypatch):
    """Else a power failure after the return could leave an empty file or none."""
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda d: (calls.append(stat.S_ISDIR(os.fstat(d).st_mode)), sync(d))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("named"), replace(a, b)))
    write_atomic(tmp_path / "a", b"content")
    assert calls == [False, "named", True]


def test_secret_files_are_secret_from_the_first_byte_on(tmp_path: Path):
    path = tmp_path / "secret"
    with atomic_file(path, mode=0o600) as file:
        (partial,) = tmp_path.iterdir()
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
        file.write(b"key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_there_is_kept_where_it_must_not_be_replaced(tmp_path: Path):
    path = tmp_path / "key"
    write_atomic(path, "first", replace=False)
    with pytest.raises(FileExistsError):
        write_atomic(path, "second", replace=False)
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_arrays_come_back(tmp_path: Path):
    write_array(tmp_path / "a.npy", np.arange(6).reshape(2, 3), mode=0o600)
    assert np.load(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_hash_knows_values_and_not_the_order_of_keys():
    assert short_hash([1, 2]) != short_hash([2, 1])
    assert short_hash({"a": 1, "b": [2]}) == short_hash({"b": [2], "a": 1})


def test_reason_is_one_line_whatever_the_error_says():
    assert reason(OSError()) == "OSError"
    assert reason(OSError("\n  \n first   line \nsecond")) == "first line"
    assert reason(OSError("a\nlast\n"), line=-1) == "last"
