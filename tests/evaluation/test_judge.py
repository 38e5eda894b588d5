"""Conditional fidelity: what the judge sees, what it reads, and when."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapf_ray.afterwards import splits_to_read
from sapf_ray.config import DataConfig, EvaluationConfig, RunConfig
from sapf_ray.data import open_source
from sapf_ray.evaluation import judge
from sapf_ray.evaluation.inputs import SYNTHETIC, TEST, TRAIN, Inputs
from sapf_ray.evaluation.metrics import METRICS

from .test_protocol import write_digits

CONFIG = EvaluationConfig(epochs=1, batch_size=32)


class Judged(Inputs):
    """Inputs whose synthetic labels are moved on by a number of classes."""

    moved = 0

    @property
    def synthetic(self):
        pictures = super().synthetic
        return dataclasses.replace(pictures, labels=(pictures.labels + self.moved) % 10)


def judged(directory, config=CONFIG) -> Judged:
    source = open_source(DataConfig())
    write_digits(directory, source, source.class_names, 16)
    return Judged(synthetic_dir=str(directory), source=source, resolution=16, config=config, seed=0)


def test_it_falls_with_wrong_labels_alone_and_the_judge_is_kept_secret(tmp_path, monkeypatch):
    """Real digits in the place of synthetic ones; the second evaluation trains nothing."""
    cache = tmp_path / "cache"
    inputs = judged(tmp_path, dataclasses.replace(CONFIG, cache_dir=str(cache)))
    right, worth = judge.fidelity_and_judge(inputs)
    assert right > 0.7 and worth > 0.7
    (kept,) = cache.iterdir()
    assert (kept.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
    monkeypatch.setattr(judge, "fit", None)
    monkeypatch.setattr(Judged, "moved", 1)
    unread = dataclasses.replace(inputs, reads=frozenset({SYNTHETIC, TEST}))
    assert judge.fidelity_and_judge(unread) == (pytest.approx(0, abs=0.2), worth)


def test_no_more_training_images_are_read_than_the_judge_needs(tmp_path, monkeypatch):
    inputs = judged(tmp_path)
    some = inputs.some_train(40)
    every = np.arange(40)
    images, again = some.read(every), judged(tmp_path).some_train(40).read(every)
    assert images.shape == (40, 16, 16, 3) and np.array_equal(images, again)
    assert len(np.unique(some.labels)) > 5, "drawn at random, not the first"
    assert inputs.some_train(10**6) is inputs.train
    monkeypatch.setattr(judge, "LEAST_IMAGES", 3)
    monkeypatch.setattr(Inputs, "n_synthetic", 1)
    assert METRICS["conditional_fidelity"].compute(inputs) == {}, "too few for a judge"


@pytest.mark.parametrize(
    "evaluation,learns,known,expected",
    [
        ({}, False, (), ["train", "test"]),
        ({}, True, (), ["train", "test"]),
        ({}, False, ("conditional_fidelity",), ["test"]),
        ({"fid_reference": "train"}, False, ("conditional_fidelity",), ["train", "test"]),
        ({"test_images": "all"}, False, (), ["test"]),  # none is left to train a judge
        ({"enabled": False}, True, (), ["train"]),
        ({"enabled": False}, False, (), []),
    ],
)
def test_splits_that_a_start_reads(evaluation, learns, known, expected):
    config = RunConfig(evaluation=EvaluationConfig(**evaluation))
    assert splits_to_read(config, learns=learns, known=known) == expected


def test_a_metric_may_read_no_training_image_undeclared():
    reads = METRICS["conditional_fidelity"].reads
    assert set(reads) == {SYNTHETIC, TRAIN, TEST}
