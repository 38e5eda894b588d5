"""Images that look alike: predictions without the image itself, silent where looks say nothing."""

from __future__ import annotations

import numpy as np

from sapf_ray.synthesis import likeness
from sapf_ray.synthesis.likeness import log_likeness, thumbnails

CLASSES = 4


def blobs(n: int, *, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails around one centre a class, and their classes."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, CLASSES, n)
    small = rng.normal(size=(CLASSES, 12))[shown] + noise * rng.normal(size=(n, 12))
    return small.astype(np.float32), shown


def test_a_prediction_is_that_of_a_fit_without_the_image():
    small, _ = blobs(30, noise=0.5)
    targets = np.random.default_rng(1).dirichlet(np.ones(CLASSES), 30)
    found = likeness._left_out(small.astype(np.float64), targets)
    rows = small.astype(np.float64)
    distances = np.square(rows[:, None] - rows).sum(2)
    kernel = np.exp(-distances / (likeness.WIDTH * np.median(distances)))
    for i in (0, 7, 29):
        rest = np.arange(30) != i
        fit = np.linalg.solve(
            kernel[np.ix_(rest, rest)] + likeness.RIDGE * np.eye(29), targets[rest] - 1 / CLASSES
        )
        assert np.allclose(found[i], kernel[i, rest] @ fit + 1 / CLASSES)


def test_wrong_probabilities_are_outvoted_by_images_that_look_alike():
    small, shown = blobs(200, noise=0.3)
    believed = np.where(np.arange(200) % 5 == 0, (shown + 1) % CLASSES, shown)
    predicted = log_likeness(small, np.eye(CLASSES)[believed]).argmax(1)
    assert (believed == shown).mean() == 0.8
    assert (predicted == shown).mean() > 0.95


def test_where_looks_say_nothing_the_witness_is_nearly_silent():
    small = np.random.default_rng(2).normal(size=(200, 12)).astype(np.float32)
    believed = np.eye(CLASSES)[np.random.default_rng(3).integers(0, CLASSES, 200)]
    assert np.ptp(log_likeness(small, believed), axis=1).mean() < 0.3 * likeness.SHARPNESS
    same = log_likeness(np.zeros((200, 12), np.float32), believed)
    assert np.ptp(same, axis=1).max() < 0.2 * likeness.SHARPNESS


def test_blocks_do_not_see_each_other(monkeypatch):
    small, shown = blobs(90, noise=0.5)
    believed = np.eye(CLASSES)[shown]
    monkeypatch.setattr(likeness, "BLOCK", 40)
    together = log_likeness(small, believed)
    parts = [log_likeness(small[i : i + 40], believed[i : i + 40]) for i in (0, 40, 80)]
    assert np.array_equal(together, np.concatenate(parts))


def test_thumbnails_of_any_size():
    for side in (8, 32, 50):
        images = np.full((2, side, side, 3), 51, np.uint8)
        assert np.allclose(thumbnails(images), 0.2)
        assert thumbnails(images).shape == (2, 3 * likeness.SIDE**2)
