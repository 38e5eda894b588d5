"""``data.on_error``: what cannot be read stops a run, or contributes nothing and is counted."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.config import DataConfig, from_dict
from sapf_ray.data import open_source
from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.pipeline import splits_to_read
from tests.data.folders import put, some
from tests.data.sources.made import SOURCES

SKIPPING = [key for key, case in SOURCES.items() if case.unreadable]


@pytest.fixture
def folder(tmp_path):
    some(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", n=3)
    put(tmp_path, "train/cat/00.png", "test/dog/01.png", content=b"broken")
    return tmp_path


def opened(folder, on_error):
    return open_source(DataConfig(source="image_folder", path=str(folder), on_error=on_error))


def test_a_skipped_record_keeps_its_place_and_is_marked(folder):
    source = opened(folder, "skip")
    source.verify()
    assert source.n_train == 6
    _, labels = source.read("train", np.arange(6), resolution=4)
    assert labels.tolist() == [SKIPPED, 0, 0, 1, 1, 1]
    images, labels = source.read_whole("train", resolution=4)
    assert len(images) == 5 and SKIPPED not in labels
    with pytest.raises(DataError, match=r"00\.png"):
        opened(folder, "stop").read("train", np.arange(6), resolution=4)


def test_all_faults_and_duplicates_are_reported(folder):
    found = opened(folder, "stop").inspect()
    assert {split: len(faults) for split, faults in found.faults.items()} == {"train": 1, "test": 1}
    assert found.duplicates == 10 - 1 + 1
    assert "2 images cannot be read:" in found.report()[0]


def test_only_the_splits_that_are_read_are_looked_at(folder):
    put(folder, "train/cat/00.png")
    opened(folder, "stop").verify(("train",))
    with pytest.raises(DataError, match=r"01\.png"):
        opened(folder, "stop").verify(("test",))
    assert opened(folder, "stop").inspect(()).n_faults == 0


@pytest.mark.parametrize("key", SKIPPING)
def test_every_source_of_single_images_skips_and_counts(key, tmp_path):
    case = SOURCES[key]
    path = str(case.build(tmp_path, case.unreadable))
    name = key.partition("/")[0]
    right = open_source(DataConfig(source=name, path=path))
    source = open_source(DataConfig(source=name, path=path, on_error="skip"))
    assert (source.n_train, source.n_test) == (right.n_train, right.n_test)
    assert source.fingerprint() != right.fingerprint()
    found = source.inspect()
    source.verify()
    assert found.n_faults
    for split, n in (("train", source.n_train), ("test", source.n_test)):
        images, labels = source.read(split, np.arange(n), resolution=8)
        skipped = labels == SKIPPED
        assert skipped.sum() == len(found.faults[split])
        assert not images[skipped].any()
        assert np.array_equal(labels[~skipped], source.labels(split)[~skipped])
    with pytest.raises(DataError, match="cannot be read"):
        for split, n in (("train", right.n_train), ("test", right.n_test)):
            right.read(split, np.arange(n), resolution=8)


@pytest.mark.parametrize("key", [key for key in SKIPPING if key != "image_folder"])
def test_nothing_readable_is_refused(key, tmp_path, monkeypatch):
    case = SOURCES[key]
    path = str(case.build(tmp_path, "right"))
    source = open_source(DataConfig(source=key.partition("/")[0], path=path, on_error="skip"))

    def broken(split, rows, *, resolution):
        return iter([DataError("broken.png: cannot be read")] * len(rows))

    monkeypatch.setattr(source, "decoded", broken)
    with pytest.raises(DataError, match="no other image of the train split"):
        source.verify()


@pytest.mark.parametrize("name", ["digits", "cifar10", "octmnist", "mnist", "npz"])
def test_arrays_cannot_be_skipped_record_by_record(name):
    with pytest.raises(ConfigError, match=r"data\.on_error = 'skip': .*must be stop"):
        open_source(DataConfig(source=name, path="/nowhere", on_error="skip"))


def test_without_evaluation_the_test_split_is_no_split_to_read():
    config = from_dict({"evaluation": {"enabled": False}})
    assert splits_to_read(config, learns=True) == ["train"]
    assert splits_to_read(config, learns=False) == []


@pytest.mark.parametrize("key", [*SOURCES])
def test_inspecting_train_reads_no_test_image(key, tmp_path, monkeypatch):
    case = SOURCES[key]
    path = str(case.build(tmp_path, "right"))
    source = open_source(DataConfig(source=key.partition("/")[0], path=path))
    touched = []
    for attribute in ("decoded", "pixel_rows", "_batches"):
        original = getattr(type(source), attribute, None)
        if original is not None:

            def noting(self, split, *args, original=original, **options):
                touched.append(split)
                return original(self, split, *args, **options)

            monkeypatch.setattr(type(source), attribute, noting)
    source.inspect(["train"])
    source.read("train", np.arange(2), resolution=8)
    assert "test" not in touched
