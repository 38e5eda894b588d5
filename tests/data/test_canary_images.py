"""Crafted images behind a source's own: in by their coins, known by nothing else."""

from __future__ import annotations

import pickle

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SKIPPED, open_source
from sapf_ray.data.canary_images import CanaryImages

COUNT = 40


def images_of(folder) -> CanaryImages:
    return CanaryImages(
        open_source(DataConfig(source="digits")), count=COUNT, coins=folder / "audit" / "coins.npy"
    )


def test_canaries_lie_behind_the_records_and_the_outs_cannot_be_read(tmp_path):
    images = images_of(tmp_path)
    own = images.source.n_train
    assert images.n_train == own + COUNT and images.n_test == images.source.n_test
    assert not (tmp_path / "audit").exists(), "opening it makes nothing"
    pictures, labels = images.read("train", np.array([own + 3, 5, own, own + 1]), resolution=16)
    coins = images.coins()
    expected, label = images.source.read("train", np.array([5]), resolution=16)
    assert np.array_equal(pictures[1], expected[0]) and labels[1] == label[0]
    crafted, classes = images.crafted(np.array([3, 0, 1]), resolution=16)
    for row, place in enumerate((3, 0, 1)):
        at = (0, 2, 3)[row]
        assert labels[at] == (classes[row] if coins[place] else SKIPPED)
        assert np.array_equal(pictures[at], crafted[row]) == coins[place]
    whole = images.labels("train")
    assert np.array_equal(whole[own:] != SKIPPED, coins)
    assert np.array_equal(whole[:own], images.source.labels("train"))


def test_coins_are_secret_kept_and_not_those_of_another_run(tmp_path):
    images = images_of(tmp_path)
    coins = images.coins()
    assert 5 < coins.sum() < COUNT - 5
    assert oct((tmp_path / "audit" / "coins.npy").stat().st_mode)[-3:] == "600"
    assert np.array_equal(pickle.loads(pickle.dumps(images)).coins(), coins), "in a Ray task, too"
    other = images_of(tmp_path / "other")
    (tmp_path / "other").mkdir()
    assert not np.array_equal(other.coins(), coins)
    assert other.fingerprint() != images.fingerprint()
