"""`sapf init`, called in this process."""

from __future__ import annotations

import pytest

from sapf_ray import first_config
from sapf_ray.config import from_dict
from sapf_ray.config.yaml_text import read_yaml
from sapf_ray.estimate.machine import Machine
from tests.commands import call
from tests.data.folders import some


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    monkeypatch.setattr(first_config, "this_machine", lambda: Machine(cores=2, memory_gb=16))


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos #1"
    some(root, "cat", "dog", n=30)
    return root


FAST = ("--privacy.non_private", "true")


def test_it_writes_a_config_that_loads_unchanged_and_names_the_next_command(
    capsys, tmp_path, photos
):
    file = tmp_path / "run.yaml"
    code, out, err = call(capsys, "init", str(photos), "--out", str(file), *FAST)
    assert (code, err) == (0, "")
    config = from_dict(read_yaml(file))
    assert config.data.path == str(photos) and config.data.source == "image_folder"
    assert config.finetune.batch_size <= 48
    command = f"sapf run --config '{file}'" if " " in str(file) else f"sapf run --config {file}"
    assert command in out and "2 classes (cat, dog)" in out and "minutes: start" in out
    code, _, err = call(capsys, "plan", "--config", str(file))
    assert (code, err) == (0, "")


def test_an_existing_file_is_replaced_only_by_force(capsys, tmp_path, photos):
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    code, _, err = call(capsys, "init", str(photos), "--out", str(file))
    assert code == 2 and err.count("\n") == 1 and "exists already" in err and "--force" in err
    assert file.read_text() == "mine"
    code, _, _ = call(capsys, "init", str(photos), "--out", str(file), "--force", *FAST)
    assert code == 0 and file.read_text() != "mine"


@pytest.mark.parametrize(
    ("folders", "inside", "words"),
    [
        ((), "", "no class sub-folders"),
        ((), "gone", "no such directory"),
        (("cat",), "", "only one class"),
    ],
)
def test_a_folder_without_classes_is_one_line(capsys, tmp_path, folders, inside, words):
    root = tmp_path / "photos"
    root.mkdir()
    some(root, *folders)
    file = tmp_path / "run.yaml"
    code, out, err = call(capsys, "init", str(root / inside), "--out", str(file))
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not file.exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--minutes", "0", "--minutes 0"),
        ("--minutes", "soon", "--minutes"),
        ("--privacy.epsilon", "0", "privacy.epsilon = 0"),
        ("--out", "/proc/none/run.yaml", "cannot be written"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, photos, option, value, words):
    out = ("--out", str(tmp_path / "r.yaml")) if option != "--out" else ()
    code, _, err = call(capsys, "init", str(photos), *FAST, *out, option, value)
    assert code == 2 and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("train.parquet", "parquet"),
        ("data/train.parquet", "parquet"),
        ("dataset_dict.json", "arrow"),
        ("train/000.tar", "webdataset"),
        ("mine.npz", "npz"),
        ("cat/1.png", "image_folder"),
        ("labels.csv", "image_folder"),
    ],
)
def test_the_source_is_recognised_by_names(tmp_path, name, source):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert first_config.source_of(tmp_path) == source
    if file.parent == tmp_path and file.suffix != ".json":
        assert first_config.source_of(file) == source


def test_classes_whose_words_are_unknown_are_told(capsys, tmp_path):
    some(tmp_path / "photos", "0", "1", n=30)
    file = tmp_path / "run.yaml"
    code, out, _ = call(capsys, "init", str(tmp_path / "photos"), "--out", str(file), *FAST)
    assert code == 0 and "class words are unknown" in out
