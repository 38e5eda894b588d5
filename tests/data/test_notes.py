"""What is said of the data: lines with names of files reach a terminal and nothing that is kept."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from sapf_ray.commands.say import note
from sapf_ray.config import from_dict
from sapf_ray.data import open_source
from sapf_ray.errors import DataError
from sapf_ray.pipeline import inspect, skipped_records
from sapf_ray.runs import runlog
from sapf_ray.runs.directory import RunDirectory
from tests.data.folders import put, some
from tests.data.sources.made import SOURCES


def started(name, path, out, on_error="skip"):
    """As much of a run as looks at the data; the lines that it says, and the run."""
    config = from_dict({"data": {"source": name, "path": str(path), "on_error": on_error}})
    out.mkdir()
    directory = RunDirectory(out)
    run = SimpleNamespace(config=config, source=open_source(config.data), directory=directory)
    lines = []
    place = runlog.Place(path=str(out / "run.log.jsonl"), run="r")
    with runlog.start_of_run(place, resumed=False):
        inspect(run, ["train", "test"], on_note=lambda *line: lines.append(line))
    return lines, run


def kept(out):
    """All that the run directory holds."""
    return "".join(path.read_text() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", [key for key, case in SOURCES.items() if case.unreadable])
def test_names_are_for_the_terminal_only(key, tmp_path):
    case = SOURCES[key]
    root = tmp_path / "data"
    root.mkdir()
    path = case.build(root, case.unreadable)
    lines, run = started(key.partition("/")[0], path, tmp_path / "run")
    secret = [line for line, terminal_only in lines if terminal_only]
    public = [line for line, terminal_only in lines if not terminal_only]
    assert any(str(root) in line for line in secret)
    for text in (*public, kept(tmp_path / "run")):
        assert str(root) not in text and "cannot be read" not in text
    counts = skipped_records(run)
    assert set(counts) == {"train", "test"} and sum(counts.values()) > 0


def test_links_and_duplicates_are_named_on_the_terminal_only(tmp_path):
    root = tmp_path / "data"
    some(root, "train/cat", "train/dog", "test/cat", "test/dog", n=3)
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "gone")
    put(root, "train/cat/notes.txt", content=b"Erika")
    lines, _ = started("image_folder", root, tmp_path / "run")
    assert ("1 links lead to nothing", False) in lines
    assert (f"{root}/train/cat/more: a link to nothing", True) in lines
    assert not [line for line, secret in lines if not secret and str(root) in line]


def test_a_fault_that_stops_leaves_the_class_of_the_error_only(tmp_path):
    case = SOURCES["webdataset"]
    root = tmp_path / "data"
    root.mkdir()
    path = case.build(root, case.unreadable)
    with pytest.raises(DataError, match=r"s0000\.png"):
        started("webdataset", path, tmp_path / "run", on_error="stop")
    text = kept(tmp_path / "run")
    assert json.loads(text.splitlines()[-1])["error"] == "DataError"
    assert "s0000" not in text and str(root) not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_for_the_terminal_is_not_printed_elsewhere(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    note(console, "/photos/erika.png: cannot be read", secret=True)
    note(console, "3 files are no images", secret=False)
    text = console.file.getvalue()
    assert ("erika" in text) == terminal and "3 files are no images" in text
