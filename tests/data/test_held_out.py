"""Images held out for the scores of a private choice: drawn by a key, never trained on."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sapf_ray.config import DataConfig
from sapf_ray.data.base import open_source
from sapf_ray.data.held_out import WithoutHeldOut, draw_split
from sapf_ray.errors import DataError
from sapf_ray.privacy.keyed_rng import NoiseKey

HELD_OUT = 130


def part(folder, seed: int = 0) -> WithoutHeldOut:
    source = open_source(DataConfig(source="digits"))
    split = folder / f"split{seed}.npy"
    if not split.exists():
        draw_split(split, source.n_train, HELD_OUT, key=NoiseKey.create(seed))
    return WithoutHeldOut(source, held_out=HELD_OUT, split=split)


def test_every_image_is_on_one_side_and_read_as_it_was(tmp_path):
    images = part(tmp_path)
    assert images.n_train == images.source.n_train - HELD_OUT
    both = np.concatenate([images.kept, images.held_out])
    assert np.array_equal(np.sort(both), np.arange(images.source.n_train))
    asked = np.array([7, 0, images.n_train - 1])
    pictures, labels = images.read("train", asked, resolution=16)
    expected, classes = images.source.read("train", images.kept[asked], resolution=16)
    assert np.array_equal(pictures, expected) and np.array_equal(labels, classes)
    assert np.array_equal(images.labels("train"), images.source.labels("train")[images.kept])
    assert np.array_equal(images.labels("test"), images.source.labels("test"))
    with pytest.raises(IndexError):
        images.read("train", np.array([images.n_train]), resolution=16)


def test_the_split_is_secret_and_follows_from_the_key_alone(tmp_path):
    images = part(tmp_path)
    assert oct((tmp_path / "split0.npy").stat().st_mode)[-3:] == "600"
    assert np.array_equal(pickle.loads(pickle.dumps(images)).held_out, images.held_out)
    other = part(tmp_path, seed=1)
    assert not np.array_equal(other.held_out, images.held_out)
    assert other.fingerprint() != images.fingerprint()
    assert other.whole.fingerprint() == images.whole.fingerprint(), "the same images"


def test_each_image_is_held_out_as_often_as_any_other(tmp_path):
    counts = np.zeros(50)
    for seed in range(100):
        path = tmp_path / "split.npy"
        draw_split(path, 50, 10, key=NoiseKey.create(seed))
        counts[np.load(path)] += 1
    assert counts.sum() == 1000
    # 49 degrees of freedom but for the factor of draws without replacement
    statistic = ((counts - 20) ** 2 / (100 * 0.2 * 0.8)).sum() * 49 / 50
    assert 20 < statistic < 95


def test_without_its_file_sizes_are_known_and_images_are_not(tmp_path):
    source = open_source(DataConfig(source="digits"))
    images = WithoutHeldOut(source, held_out=HELD_OUT, split=tmp_path / "gone.npy")
    assert images.n_units == source.n_train - HELD_OUT
    with pytest.raises(DataError, match="says which images are held out"):
        images.read("train", np.array([0]), resolution=16)
