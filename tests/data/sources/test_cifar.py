"""CIFAR-10 from pickles as published: read in full, lazily, and never run."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil

import numpy as np
import pytest

from sapf_ray.config import DataConfig, ModelConfig
from sapf_ray.data import open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.sources import _cifar
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.files import file_digest
from sapf_ray.latents import build_latent_cache
from tests.data.sources.published import (
    cifar_batch,
    open_named,
    python2_pickle,
    read_all,
    refusal,
    write_cifar10,
)

LAYOUT = _cifar.LAYOUTS["cifar10"]


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    return folder, *write_cifar10(folder)


def test_reads_what_was_written_from_the_folder_or_the_one_above(published):
    folder, pixels, labels = published
    assert (folder / "data_batch_1").read_bytes()[:2] == b"\x80\x02"
    for path in (folder, folder.parent):
        source = open_named("cifar10", path)
        assert (source.n_train, source.n_test) == (35, 7)
        for split, rows in (("train", slice(0, 35)), ("test", slice(35, 42))):
            images, found = read_all(source, split, 32)
            assert np.array_equal(images, pixels[rows]) and images.dtype == np.uint8
            assert np.array_equal(found, labels[rows]) and np.array_equal(
                source.labels(split), found
            )
        source.verify()


def test_order_repeats_and_size(published):
    folder, pixels, labels = published
    indices = np.array([34, 0, 20, 0])
    images, found = open_named("cifar10", folder).read("train", indices, resolution=32)
    assert np.array_equal(images, pixels[indices]) and np.array_equal(found, labels[indices])
    assert open_named("cifar10", folder).read("test", np.array([1]), resolution=48)[0].shape == (
        1,
        48,
        48,
        3,
    )
    with pytest.raises(IndexError):
        open_named("cifar10", folder).read("train", np.array([35]), resolution=32)


class Counting:
    """A file that counts what is read from it."""

    total = 0

    def __init__(self, file):
        self.file = file
        self.tell = file.tell
        self.seek = file.seek
        self.fileno = file.fileno

    def _count(self, part):
        Counting.total += len(part)
        return part

    def read(self, n):
        return self._count(self.file.read(n))

    def readline(self):
        return self._count(self.file.readline())


def test_opening_reads_no_pixel(published, monkeypatch):
    class Skipping(_cifar._SkippingFile):
        def __init__(self, file):
            super().__init__(Counting(file))

    Counting.total = 0
    monkeypatch.setattr(_cifar, "_SkippingFile", Skipping)
    monkeypatch.setattr(np, "memmap", lambda *a, **k: pytest.fail("pixels were read"))
    source = open_named("cifar10", published[0])
    assert source.n_train == 35 and len(source.labels("train")) == 35
    files = sum((published[0] / name).stat().st_size for name in LAYOUT.names)
    assert 0 < Counting.total == files - 42 * 3072


def test_training_ends_at_45000(published, monkeypatch):
    row = dataclasses.replace(DATA_SETS["cifar10"], n_train=30)
    monkeypatch.setitem(DATA_SETS, "cifar10", row)
    source = open_named("cifar10", published[0])
    assert source.n_train == 30 == len(source.labels("train"))
    assert np.array_equal(read_all(source, "train", 32)[0], published[1][:30])
    assert np.array_equal(read_all(source, "test", 32)[0], published[1][35:])


def test_prompts_and_a_small_pickle(published):
    source = open_named("cifar10", published[0])
    assert source.prompts[:2] == ("An image of an airplane", "An image of an automobile")
    assert source.prompts[9] == "An image of a truck"
    packed = pickle.dumps(source)
    assert len(packed) < 2000
    assert np.array_equal(
        read_all(pickle.loads(packed), "test", 32)[0], read_all(source, "test", 32)[0]
    )


def test_fingerprint_follows_the_pixels(published):
    folder, pixels, labels = published
    first = open_named("cifar10", folder).fingerprint()
    assert open_named("cifar10", folder).fingerprint() == first
    changed = pixels[:7].copy()
    changed[3, 5, 5, 1] ^= 1
    (folder / "data_batch_1").write_bytes(python2_pickle(cifar_batch(labels[:7], changed)))
    assert open_named("cifar10", folder).fingerprint() != first


@pytest.mark.parametrize("order", ["C", "F"])
def test_protocol_3_and_either_order_of_axes(published, order):
    folder, pixels, labels = published
    batch = cifar_batch(labels[:7], pixels[:7])
    batch = {
        key.decode(): np.asarray(v, order=order) if key == b"data" else v
        for key, v in batch.items()
    }
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=3))
    assert np.array_equal(read_all(open_named("cifar10", folder), "train", 32)[0], pixels[:35])


class Malicious:
    def __reduce__(self):
        return os.system, ("touch " + self.target,)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(published, tmp_path, name):
    evil = Malicious()
    evil.target = str(tmp_path / "ran")
    batch = {**cifar_batch(published[2][:7], published[1][:7]), b"filenames": evil}
    (published[0] / name).write_bytes(pickle.dumps(batch, protocol=3))
    message = refusal("cifar10", published[0])
    assert name in message and "system" in message and not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil, protocol=3))  # it would have
    assert (tmp_path / "ran").exists()


def test_a_full_batch_must_have_the_published_checksum(published, monkeypatch):
    full = dataclasses.replace(LAYOUT, n_per_file={"train": 7, "test": 7})
    monkeypatch.setitem(_cifar.LAYOUTS, "cifar10", full)
    message = refusal("cifar10", published[0])
    assert (
        "data_batch_1" in message
        and "c99cafc152244af753f735de768cd75f" in message
        and "cs.toronto.edu" in message
    )
    own = {
        split: {name: file_digest(published[0] / name, "md5") for name in files}
        for split, files in LAYOUT.files.items()
    }
    monkeypatch.setitem(_cifar.LAYOUTS, "cifar10", dataclasses.replace(full, files=own))
    open_named("cifar10", published[0]).verify()


def damage(folder, pixels, labels, kind):
    path = folder / "data_batch_2"
    batch = cifar_batch(labels[:7], pixels[:7])
    if kind == "missing":
        path.unlink()
    elif kind == "truncated in the pixels":
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "truncated at the end":
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a pickle")
    elif kind == "protocol":
        path.write_bytes(pickle.dumps(batch, protocol=4))
    elif kind == "labels":
        path.write_bytes(python2_pickle({**batch, b"labels": batch[b"labels"][:-1]}))
    elif kind == "range":
        path.write_bytes(python2_pickle({**batch, b"labels": [10] * 7}))
    elif kind == "width":
        path.write_bytes(python2_pickle({**batch, b"data": batch[b"data"][:, :-1]}))
    elif kind == "no data":
        path.write_bytes(python2_pickle({b"labels": [1]}))


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated in the pixels",
        "truncated at the end",
        "empty",
        "text",
        "protocol",
        "labels",
        "range",
        "width",
        "no data",
    ],
)
def test_a_damaged_batch_is_named(published, kind):
    damage(*published, kind)
    assert "data_batch_2" in refusal("cifar10", published[0])


def test_other_class_names(published):
    (published[0] / "batches.meta").write_bytes(
        python2_pickle({b"label_names": [b"apple", b"fish"]})
    )
    message = refusal("cifar10", published[0])
    assert "batches.meta" in message and "airplane" in message


def test_path(published, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path.*cs\.toronto\.edu"):
        open_source(DataConfig(source="cifar10"))
    assert "no such" in refusal("cifar10", tmp_path / "nowhere")
    assert "cs.toronto.edu" in refusal("cifar10", tmp_path / "nowhere")
    shutil.rmtree(published[0])
    assert "data_batch_1" in refusal("cifar10", tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    for path in (archive, tmp_path):
        assert "tar xzf cifar-10-python.tar.gz" in refusal("cifar10", path)


@pytest.mark.long  # test_latents.py has it for digits
def test_latent_cache_in_ray_tasks(published, ray_cluster, tiny_pipeline, tmp_path):
    source = open_named("cifar10", published[0])
    cache = build_latent_cache(
        tmp_path / "latents",
        source,
        model=ModelConfig(path=str(tiny_pipeline)),
        shard_size=20,
    )
    assert cache.complete and np.array_equal(
        np.load(tmp_path / "latents" / "labels.npy"), published[2][:35]
    )
    assert cache.read(np.arange(35))[0].shape == (35, 8, 4, 4)


def test_a_batch_that_goes_away_is_named(published):
    source = open_named("cifar10", published[0])
    (published[0] / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4"):
        source.read("train", np.array([0]), resolution=32)
