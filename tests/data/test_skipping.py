"""``data.on_error``: what cannot be read stops a run, or contributes nothing and is counted."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import DataError
from tests.data.folders import put, some


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
