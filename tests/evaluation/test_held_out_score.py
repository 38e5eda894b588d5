"""The score of a trial: sensitivity 1, noise as planned, right answers of a classifier."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data.base import SKIPPED, open_source
from sapf_ray.errors import BudgetError
from sapf_ray.evaluation import held_out_score
from sapf_ray.evaluation.held_out_score import release_score, votes_of
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.privacy import noise as noise_module
from sapf_ray.privacy.fixed_point import ONE_VOTE
from tests.mechanisms import check_drawn, half_the_noise, releaser_of, without_noise


def check_noise(tmp_path) -> None:
    drawn = []
    for i in range(60):
        votes = np.full(100 + i, ONE_VOTE)  # another sum has other noise
        (tmp_path / str(i)).mkdir()
        drawn.append(release_score(votes, releaser_of("score", tmp_path / str(i))) - len(votes))
    check_drawn(np.array(drawn) / 4.0)


def test_noise_is_as_planned(tmp_path):
    check_noise(tmp_path)


@pytest.mark.parametrize("mechanism", [without_noise, half_the_noise])
def test_broken_twins_are_rejected(tmp_path, monkeypatch, mechanism):
    monkeypatch.setattr(noise_module, "noisy_sum", mechanism)
    with pytest.raises(AssertionError):
        check_noise(tmp_path)


def test_another_sum_is_not_paid_twice(tmp_path):
    releaser = releaser_of("score", tmp_path, noise=5.0, epsilon=0.9)
    first = release_score(np.full(40, ONE_VOTE), releaser)
    assert release_score(np.full(40, ONE_VOTE), releaser) == first, "a replay"
    with pytest.raises(BudgetError):
        release_score(np.full(39, ONE_VOTE), releaser)


@pytest.fixture
def inputs(monkeypatch) -> Inputs:
    """Digits, for classifiers that are right where the image is bright or dark."""
    monkeypatch.setattr(held_out_score, "fit", lambda recipe, train, **settings: recipe)
    monkeypatch.setattr(Inputs, "synthetic", None)
    return Inputs(
        synthetic_dir="unused",
        source=open_source(DataConfig(source="digits")),
        resolution=16,
        config=EvaluationConfig(classifiers=("cnn", "cnn")),
        seed=0,
    )


def test_each_record_adds_at_most_one_and_moves_no_other(inputs, monkeypatch):
    labels = inputs.source.labels("train")
    models = iter(range(100))
    monkeypatch.setattr(
        held_out_score,
        "predicted",
        # the first of two networks is right about threes, the second about everything
        lambda model, images, device: np.where(
            next(models) % 2 == 0, np.full(len(images), 3), found["labels"]
        ),
    )
    found: dict[str, np.ndarray] = {}
    read = inputs.source.read

    def reading(split, rows, resolution):
        images, found["labels"] = read(split, rows, resolution=resolution)
        if found.get("skips"):
            found["labels"][0] = SKIPPED
        return images, found["labels"]

    monkeypatch.setattr(inputs.source, "read", reading)
    held_out = np.arange(0, 600, 2)
    votes = votes_of(inputs, held_out)
    right = labels[held_out] == 3
    assert np.array_equal(votes, np.where(right, ONE_VOTE, ONE_VOTE // 2))
    found["skips"] = True
    fewer = votes_of(inputs, held_out)
    assert fewer[0] == 0, "a record that cannot be read counts for nothing"
    changed = np.flatnonzero(fewer != votes)
    assert set(changed) <= {0, held_out_score.TOGETHER}
