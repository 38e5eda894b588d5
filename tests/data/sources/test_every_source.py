"""Every source, right and with each fault: read as written, or one line that names the file."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data import by_position, open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import ConfigError, SapfError
from tests.data.sources.made import SOURCES
from tests.data.sources.published import read_all


@pytest.fixture(params=SOURCES)
def made(request, tmp_path):
    """The source's name, what it should be, and its config."""
    case = SOURCES[request.param]
    name = request.param.partition("/")[0]
    path = case.build(tmp_path, "right")
    return name, case, DataConfig(source=name, path=str(path))


def test_reads_what_was_written(made):
    _, case, config = made
    source = open_source(config)
    source.verify()
    sizes = (source.n_train, source.n_test)
    assert (sizes if len(case.sizes) == 2 else (sum(sizes),)) == case.sizes
    assert source.class_names[:2] == case.classes
    assert len(source.prompts) == len(source.class_names)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() == open_source(config).fingerprint()
    for split in ("train", "test"):
        images, labels = read_all(source, split, 16)
        assert images.shape == (len(labels), 16, 16, 3) and images.dtype == np.uint8
        assert np.array_equal(labels, source.labels(split)) and labels.dtype == np.int64
        assert labels.min() >= 0 and labels.max() < len(source.class_names)
        order = np.array([len(labels) - 1, 0, 1, 0])
        again, some = copy.read(split, order, resolution=16)
        assert np.array_equal(again, images[order]) and np.array_equal(some, labels[order])
        with pytest.raises(IndexError):
            source.read(split, np.array([len(labels)]), resolution=16)


@pytest.mark.parametrize("key", ["webdataset", "webdataset/json", "arrow", "parquet"])
def test_each_record_has_its_own_image_and_label(key, tmp_path):
    case = SOURCES[key]
    path = case.build(tmp_path, "right")
    source = open_source(DataConfig(source=key.partition("/")[0], path=str(path)))
    for split, first, n in (("train", 0, source.n_train), ("test", 200, 6)):
        images, labels = read_all(source, split, 6)
        values = np.arange(first, first + n)
        assert np.array_equal(images[:, 2, 2, 0], values)
        assert np.array_equal(labels, values % 2)


def test_opening_reads_no_pixel(made, monkeypatch):
    _, _, config = made

    def refuse(*args, **kwargs):
        raise AssertionError("an image was read")

    original = by_position.ArrayRows.rows
    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(np, "memmap", refuse)
    monkeypatch.setattr(
        by_position.ArrayRows,
        "rows",
        lambda self, rows: original(self, rows) if len(self.shape) == 1 else refuse(),
    )
    source = open_source(config)
    assert source.n_train and source.fingerprint() and len(source.labels("test"))
    with pytest.raises((AssertionError, SapfError), match="an image was read"):
        source.read("train", np.arange(2), resolution=8)


@pytest.mark.parametrize(
    ("key", "fault"), [(key, fault) for key in SOURCES for fault in SOURCES[key].words]
)
def test_a_fault_is_one_line_that_names_the_file(key, fault, tmp_path):
    case = SOURCES[key]
    path = case.build(tmp_path, fault)
    with pytest.raises(SapfError) as caught:
        open_source(DataConfig(source=key.partition("/")[0], path=str(path))).verify()
    message = str(caught.value)
    assert case.words[fault] in message and str(tmp_path) in message, message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in SOURCES}))
def test_a_path_that_is_not_there_or_not_given(name, tmp_path):
    with pytest.raises(SapfError, match="nowhere"):
        open_source(DataConfig(source=name, path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"data\.path"):
        open_source(DataConfig(source=name))


def test_what_a_source_does_not_heed_is_refused_before_it_is_opened(tmp_path):
    requested = {"on_error": "skip", "pixel_range": (0, 1)}
    for row in DATA_SETS.values():
        for key, value in requested.items():
            config = DataConfig(source=row.name, path=str(tmp_path / "nowhere"), **{key: value})
            with pytest.raises(SapfError) as caught:
                open_source(config)
            assert (f"data.{key}" in str(caught.value)) == (key not in row.options), row.name


@pytest.mark.parametrize("key", [key for key in SOURCES if key != "image_folder"])
def test_a_folder_of_another_kind_says_of_which(key, tmp_path):
    path = SOURCES[key].build(tmp_path, "right")
    name = {"cifar100_coarse": "cifar100", "camelyon": "", "eurosat": "eurosat"}
    wanted = name.get(key, key.partition("/")[0])
    with pytest.raises(SapfError) as caught:
        open_source(DataConfig(source="image_folder", path=str(path)))
    message = str(caught.value)
    assert message.endswith(f"it looks like data.source = {wanted}") or not wanted, message
