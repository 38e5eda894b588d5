"""Scores of sets of images with known answers, and beside torch-fidelity's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch_fidelity

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.evaluation import fidelity, set_values
from sapf_ray.evaluation.features import FEATURES
from sapf_ray.evaluation.fidelity import frechet_distance
from sapf_ray.evaluation.inputs import REFERENCE, SYNTHETIC, Inputs
from sapf_ray.evaluation.metrics import METRICS, from_real_images, requested
from sapf_ray.evaluation.pictures import InMemory
from sapf_ray.evaluation.set_scores import SCORES
from sapf_ray.evaluation.set_values import (
    fid_of,
    fid_per_class_of,
    inception_score_of,
    kid_of,
    precision_recall_of,
)

CONFIG = EvaluationConfig(scores=list(SCORES))
GLYPH = FEATURES["glyph"]


class Pair(Inputs):
    """Two sets of images in memory, in place of a data set and a source."""

    @property
    def synthetic(self):
        return self._kept["ours"]

    @property
    def reference(self):
        return self._kept["theirs"]


def pair(ours, theirs, config=CONFIG):
    source = open_source(DataConfig())
    inputs = Pair(synthetic_dir="", source=source, resolution=32, config=config, seed=0)
    inputs._kept.update(ours=ours, theirs=theirs)
    return inputs


@pytest.fixture(scope="module")
def digits():
    images, labels = open_source(DataConfig()).read("train", np.arange(300), resolution=32)
    return InMemory(pixels=images, labels=labels)


def some(pictures, rows):
    return InMemory(pixels=pictures.read(rows), labels=pictures.labels[rows])


@pytest.fixture(scope="module")
def halves(digits):
    return pair(some(digits, np.arange(0, 300, 2)), some(digits, np.arange(1, 300, 2)))


def test_equal_sets_and_noise(digits, halves):
    same = pair(digits, digits)
    noise = InMemory(
        pixels=np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8),
        labels=digits.labels,
    )
    other = pair(noise, digits)
    assert precision_recall_of(same, GLYPH) == {"precision": 1.0, "recall": 1.0}
    assert max(precision_recall_of(other, GLYPH).values()) < 0.02
    assert abs(kid_of(same, GLYPH)["kid"]) < 0.05 * kid_of(other, GLYPH)["kid"]
    assert abs(kid_of(halves, GLYPH)["kid"]) < 0.05 * kid_of(other, GLYPH)["kid"]
    assert fid_of(same, GLYPH)["fid"] < 1e-3 < fid_of(halves, GLYPH)["fid"]
    of_digits, of_noise = (inception_score_of(p, GLYPH)["inception_score"] for p in (same, other))
    assert 1 <= of_noise < of_digits <= 62


def test_they_are_those_of_torch_fidelity(halves):
    ours, theirs = halves.synthetic, halves.reference
    options = {"kid": True, "kid_subset_size": 150, "rng_seed": 0, "prc": True, "isc": True}
    found = fidelity.compare(ours, theirs, config=CONFIG, fid=True, **options)
    assert fid_of(halves, GLYPH)["fid"] == found[torch_fidelity.KEY_METRIC_FID]
    assert kid_of(halves, GLYPH)["kid"] == found[torch_fidelity.KEY_METRIC_KID_MEAN]
    assert precision_recall_of(halves, GLYPH) == {
        name: pytest.approx(found[name]) for name in ("precision", "recall")
    }
    assert inception_score_of(halves, GLYPH)["inception_score"] == pytest.approx(
        found[torch_fidelity.KEY_METRIC_ISC_MEAN], rel=1e-6
    )


def test_distance_of_gaussians_whose_answer_is_known(monkeypatch):
    """Equal covariances: the squared distance of the means; whole, and in blocks."""
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = values + 3
    assert frechet_distance(values, moved) == pytest.approx(8 * 9, rel=1e-9)
    scaled = frechet_distance(values, 2 * values)
    monkeypatch.setattr(fidelity, "ROWS", 300)
    assert frechet_distance(values, moved) == pytest.approx(8 * 9, rel=1e-9)
    assert frechet_distance(values, 2 * values) == pytest.approx(scaled, rel=1e-9)
    assert frechet_distance(values.float(), moved.float()) == pytest.approx(72, rel=1e-4)


def test_class_by_class_sees_what_the_whole_does_not(digits):
    """The same images under the next class's labels: as a set they are equal."""
    wrong = dataclasses.replace(digits, labels=(digits.labels + 1) % 10)
    same, moved = pair(digits, digits), pair(wrong, digits)
    assert fid_of(moved, GLYPH) == fid_of(same, GLYPH)
    assert fid_per_class_of(same, GLYPH)["fid_worst_class"] < 1e-3
    found = fid_per_class_of(moved, GLYPH)
    assert 1 < found["fid_per_class"] < found["fid_worst_class"]
    few = some(digits, np.arange(3))
    assert (
        fid_per_class_of(pair(few, few), GLYPH) == {} == precision_recall_of(pair(few, few), GLYPH)
    )


def test_features_are_extracted_once_and_only_what_is_asked_for(halves, monkeypatch):
    calls = []
    real = set_values.features_of
    monkeypatch.setattr(
        set_values, "features_of", lambda *a, **k: calls.append(a[1]) or real(*a, **k)
    )
    inputs = pair(halves.synthetic, halves.reference)
    for compute in (fid_of, kid_of, precision_recall_of, inception_score_of):
        compute(inputs, GLYPH)
    plain = dataclasses.replace(inputs, config=EvaluationConfig(), _kept=dict(halves._kept))
    for key in [key for key in plain._kept if "features" in key]:
        del plain._kept[key]
    fid_of(plain, GLYPH)
    assert calls == [["96", "logits"], ["96"]]


def test_rows_are_asked_for_and_labelled():
    names = ["kid_glyph", "precision_glyph", "recall_glyph", "fid_per_class_glyph"]
    assert not set(names) & requested(EvaluationConfig()).keys()
    asked = requested(CONFIG)
    assert {*names, "inception_score_glyph", "fid_worst_class_glyph"} <= asked.keys()
    assert not {"kid", "recall", "fid_per_class"} & asked.keys(), "those are Inception's"
    real = from_real_images(asked)
    assert set(names) <= set(real) and "inception_score_glyph" not in real
    for name in names:
        assert "not private" in METRICS[name].title and "not Inception" in METRICS[name].title
        assert METRICS[name].reads == (SYNTHETIC, REFERENCE)
    assert METRICS["inception_score_glyph"].reads == (SYNTHETIC,)
