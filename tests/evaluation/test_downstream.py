from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.evaluation.classifiers import CLASSIFIERS
from sapf_ray.evaluation.downstream import augment, mean_accuracy
from sapf_ray.evaluation.pictures import InMemory

CONFIG = EvaluationConfig(epochs=6, batch_size=32)


def bars(n, seed, side=16):
    """Class 0 has a vertical bar, class 1 a horizontal one, class 2 none."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 3
    images = rng.integers(0, 60, (n, side, side, 3), dtype=np.uint8)
    images[labels == 0, :, 6:10] = 220
    images[labels == 1, 6:10] = 220
    return images, labels


def accuracy(train, test, *, config=CONFIG, seed=0):
    sets = [InMemory(pixels=images, labels=labels) for images, labels in (train, test)]
    return mean_accuracy(*sets, data="bars", n_classes=3, config=config, seed=seed)


def test_learns_a_separable_set():
    assert 0.95 <= accuracy(bars(150, 0), bars(90, 1)) <= 1


def test_several_classifiers_are_averaged():
    config = replace(CONFIG, epochs=1, classifiers=["cnn", "resnet"])
    train, test = bars(40, 0), bars(60, 1)
    parts = [
        accuracy(train, test, config=replace(config, classifiers=[name]))
        for name in config.classifiers
    ]
    assert accuracy(train, test, config=config) == pytest.approx(np.mean(parts))


def test_shuffled_labels_give_chance():
    images, labels = bars(150, 0)
    labels = np.random.default_rng(2).permutation(labels)
    assert accuracy((images, labels), bars(300, 1)) < 0.6


def test_the_same_seed_gives_the_same_result_whatever_the_global_generator():
    noisy = bars(60, 0)
    noisy[0][:] = np.clip(
        noisy[0].astype(int) + np.random.default_rng(0).integers(-190, 190, noisy[0].shape), 0, 255
    )
    config = replace(CONFIG, epochs=2)
    first = accuracy(noisy, bars(200, 1), config=config, seed=3)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert accuracy(noisy, bars(200, 1), config=config, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_test_images_play_no_part_in_training():
    train, config = bars(60, 0), replace(CONFIG, epochs=2)
    images, labels = bars(100, 1)
    whole = accuracy(train, (images, labels), config=config)
    halves = [accuracy(train, (images[i::2], labels[i::2]), config=config) for i in (0, 1)]
    assert whole == pytest.approx(np.mean(halves))


def test_a_class_may_be_missing_and_sets_may_be_tiny():
    images, labels = bars(5, 0)
    accuracy((images, labels * 0), bars(3, 1), config=replace(CONFIG, epochs=1))
    with pytest.raises(DataError, match="at least 4"):
        accuracy((images[:3], labels[:3]), bars(3, 1))
    with pytest.raises(DataError, match="sizes must agree"):
        accuracy((images, labels), bars(3, 1, side=8))


@pytest.mark.parametrize("name", list(CLASSIFIERS))
@pytest.mark.parametrize("side", [32, 96])
def test_every_classifier_takes_small_and_large_images(name, side):
    model = CLASSIFIERS[name](7, side).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 7)


def test_small_images_keep_their_resolution_in_the_stem():
    model = CLASSIFIERS["resnet"](10, 32)
    assert model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))).shape[-2:] == (32, 32)


def test_augmentation_moves_each_image_a_little():
    images = torch.zeros(64, 3, 32, 32)
    images[:, :, 14:18, 14:18] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and len({m.numpy().tobytes() for m in moved}) == 64
    position = torch.arange(32.0)
    centre = (moved[:, 0].sum(1) * position).sum(1) / moved[:, 0].sum((1, 2))
    assert 1 < centre.std() < 3 and (centre - 15.5).abs().max() < 4
    assert abs(float(moved.sum() / images.sum()) - 1) < 0.1
