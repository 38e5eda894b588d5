"""MedMNIST from .npz files: rows by position, whether stored or deflated, and little memory."""

from __future__ import annotations

import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from sapf_ray.config import DataConfig
from sapf_ray.data import by_position
from sapf_ray.errors import ConfigError, DataError
from tests.data.sources.published import octmnist_arrays, open_named, read_all, refusal

WRITERS = {"deflated": np.savez_compressed, "stored": np.savez}


@pytest.fixture(params=WRITERS)
def published(request, tmp_path):
    arrays = octmnist_arrays()
    WRITERS[request.param](tmp_path / "octmnist_128.npz", **arrays)
    return tmp_path / "octmnist_128.npz", arrays


def test_reads_what_was_written(published):
    path, arrays = published
    for place in (path, path.parent):
        source = open_named("octmnist", place)
        assert (source.n_train, source.n_test) == (40, 6)
        source.verify()
        for split in ("train", "test"):
            images, labels = read_all(source, split, 28)
            assert np.array_equal(
                images, np.repeat(arrays[f"{split}_images"][..., None], 3, axis=-1)
            )
            assert (
                np.array_equal(labels, arrays[f"{split}_labels"][:, 0]) and labels.dtype == np.int64
            )
    assert source.prompts[3] == "An optical coherence tomography (OCT) image for retinal disease 4"


def test_any_order(published, monkeypatch):
    monkeypatch.setattr(
        by_position, "STATE_EVERY", 3000
    )  # several states within 40 images of 784 bytes
    monkeypatch.setattr(by_position, "_INPUT", 100)
    monkeypatch.setattr(by_position, "_OUTPUT", 500)
    path, arrays = published
    source = open_named("octmnist", path)
    rng = np.random.default_rng(2)
    for indices in (
        np.array([39, 0, 7, 7]),
        np.array([], int),
        *(rng.integers(0, 40, 9) for _ in range(30)),
    ):
        images, labels = source.read("train", indices, resolution=28)
        assert np.array_equal(images[..., 1], arrays["train_images"][indices])
        assert np.array_equal(labels, arrays["train_labels"][indices, 0])
    with pytest.raises(IndexError):
        source.read("train", np.array([40]), resolution=28)


def test_colour_images_and_the_paper_size_first(tmp_path):
    arrays = octmnist_arrays(channels=(3,))
    np.savez_compressed(tmp_path / "octmnist_224.npz", **octmnist_arrays())
    np.savez_compressed(tmp_path / "octmnist_128.npz", **arrays)
    assert np.array_equal(
        read_all(open_named("octmnist", tmp_path), "test", 28)[0], arrays["test_images"]
    )


def test_opening_inflates_no_image(published, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("images were read")

    monkeypatch.setattr(by_position.Deflated, "read", refuse)
    monkeypatch.setattr(by_position.Stored, "read", refuse)
    monkeypatch.setattr("sapf_ray.data.array_source.decode_pixels", refuse)
    source = open_named("octmnist", published[0])
    assert source.n_train == 40 and source.fingerprint() and len(source.labels("train")) == 40
    assert len(pickle.dumps(source)) < 2000
    with pytest.raises(AssertionError):
        source.read("train", np.array([0]), resolution=28)


def test_a_pickled_source_reads_the_same(published):
    source = open_named("octmnist", published[0])
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(read_all(copy, "train", 16)[0], read_all(source, "train", 16)[0])


def test_reading_does_not_hold_the_array(tmp_path):
    arrays = octmnist_arrays(n=300, side=224)  # 15 MB
    np.savez_compressed(tmp_path / "octmnist_224.npz", **arrays)
    source = open_named("octmnist", tmp_path)
    tracemalloc.start()
    images, _ = source.read("train", np.array([299, 3]), resolution=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert images[0, 0, 0, 0] == pytest.approx(arrays["train_images"][299, :7, :7].mean(), abs=4)


def test_a_stream_is_inflated_once_and_later_reads_start_nearby(tmp_path, monkeypatch):
    monkeypatch.setattr(by_position, "STATE_EVERY", 100_000)
    np.savez_compressed(tmp_path / "octmnist_128.npz", **octmnist_arrays(n=2000))  # 1.57 MB
    inflated = []
    original = by_position.Deflated._inflate

    def counting(self, *args, **options):
        part = original(self, *args, **options)
        inflated.append(len(part))
        return part

    monkeypatch.setattr(by_position.Deflated, "_inflate", counting)
    source = open_named("octmnist", tmp_path)
    for start in range(0, 2000, 100):  # shards in ascending order: one pass
        source.read("train", np.arange(start, start + 100), resolution=8)
    assert sum(inflated) == 2000 * 784 + 128  # with the array's header
    inflated.clear()
    source.read("train", np.array([1200]), resolution=8)
    assert sum(inflated) <= 100_000 + 784


def test_fingerprint_follows_the_content_not_the_clock(tmp_path):
    arrays = octmnist_arrays()
    path = tmp_path / "octmnist.npz"

    def fingerprint():
        np.savez_compressed(path, **arrays)
        return open_named("octmnist", path).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    arrays["train_images"][3, 3, 3] ^= 1
    assert fingerprint() != first


def rewritten(path, **changes):
    arrays = {**octmnist_arrays(), **changes}
    np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


def test_other_content(tmp_path):
    path = tmp_path / "octmnist_128.npz"
    arrays = octmnist_arrays()
    for changes, words in (
        ({"train_images": None}, ["no array train_images", "val_images"]),
        ({"test_labels": None}, ["no array test_labels"]),
        (
            {"train_labels": arrays["train_labels"][:-1]},
            ["40 train_images", "39 labels", "zenodo"],
        ),
        ({"train_labels": np.full((40, 1), 4, np.uint8)}, ["train_labels", "[0, 4)"]),
        ({"train_labels": arrays["train_labels"].astype(float)}, ["train_labels", "float64"]),
        ({"train_images": arrays["train_images"].astype(np.float32)}, ["train_images", "float32"]),
        ({"test_images": arrays["test_images"][..., 0]}, ["test_images", "(6, 28)"]),
        ({"train_labels": np.array([[object()]] * 40)}, ["octmnist_128.npz"]),  # would need pickle
    ):
        message = refusal("octmnist", rewritten(path, **changes))
        assert str(path) in message and all(word in message for word in words), message


def test_damage_is_found(published):
    path, _ = published
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("train_images.npy").header_offset + 5000
    raw = bytearray(path.read_bytes())
    raw[at : at + 64] = bytes(64)
    path.write_bytes(raw)
    assert str(path) in refusal("octmnist", path)
    path.write_bytes(raw[: len(raw) // 2])
    assert "not a readable .npz file" in refusal("octmnist", path)
    path.write_text("not a zip")
    assert "not a readable .npz file" in refusal("octmnist", path)


def test_the_published_training_set_has_the_published_test_set(tmp_path):
    source = open_named("octmnist", rewritten(tmp_path / "octmnist.npz"))
    source.n_train = 97_477
    with pytest.raises(DataError, match=r"6 test images, published are 1000"):
        source.verify()


def test_an_empty_folder(tmp_path):
    message = refusal("octmnist", tmp_path)
    assert "octmnist_128.npz" in message and "zenodo.org/records/10519652" in message


def test_another_medmnist_set_is_a_row(tmp_path):
    arrays = octmnist_arrays(channels=(3,))
    np.savez_compressed(tmp_path / "bloodmnist_64.npz", **arrays)
    source = open_named("bloodmnist", tmp_path)
    source.verify()
    assert source.n_train == 40 and len(source.class_names) == 8
    assert source.prompts[1] == "A microscope image of a blood cell: eosinophil"
    images, labels = read_all(source, "train", 28)
    assert np.array_equal(images, arrays["train_images"])
    assert np.array_equal(labels, arrays["train_labels"][:, 0])


def test_the_sets_that_cannot_be_used_say_why(tmp_path):
    for name, why in (("chestmnist", "multi-label"), ("retinamnist", "regression")):
        path = tmp_path / f"{name}_64.npz"
        np.savez_compressed(path, **octmnist_arrays())
        assert why in refusal("pathmnist", path)
        with pytest.raises(ConfigError, match=f"{name}.*{why}"):
            DataConfig(source=name)
    path = tmp_path / "dermamnist.npz"
    np.savez_compressed(path, **octmnist_arrays())
    assert "set data.source = dermamnist" in refusal("pathmnist", path)
