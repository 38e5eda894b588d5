"""The private prompt assignment: one vote a record, one noise draw, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapf_ray.config import DataConfig, ModelConfig
from sapf_ray.data.base import SKIPPED, open_source
from sapf_ray.errors import BudgetError, DataError
from sapf_ray.grounding.space import Whitening
from sapf_ray.grounding.vote import assignment, release_table, vote_table
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_features import LatentSpace
from sapf_ray.models.vocabulary import known_prompts
from sapf_ray.privacy import noise as noise_module
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.synthesis.sampler import sample_images
from tests.mechanisms import (
    check_drawn,
    half_the_noise,
    noisy_sum,
    releaser_of,
    without_noise,
)

CLASSES = 4
SAME = Whitening(np.eye(3))


def case(n: int = 60, m: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 3)).astype(np.float32)
    return features, rng.integers(0, CLASSES, n), rng.normal(size=(m, 3))


def table_of(features, labels, candidates):
    blocks = [(features[i : i + 17], labels[i : i + 17]) for i in range(0, len(labels), 17)]
    return vote_table(blocks, candidates, whiten=SAME, n_classes=CLASSES)


def test_every_record_votes_once_for_the_nearest_of_all():
    features, labels, candidates = case()
    table = table_of(features, labels, candidates)
    expected = np.zeros_like(table)
    for x, label in zip(features, labels, strict=True):
        expected[label, np.linalg.norm(candidates - x, axis=1).argmin()] += 1
    assert np.array_equal(table, expected) and table.sum() == len(labels)


def test_one_record_moves_one_cell_by_one():
    features, labels, candidates = case(n=30)
    table = table_of(features, labels, candidates)
    for i in range(30):
        without = table_of(np.delete(features, i, 0), np.delete(labels, i), candidates)
        moved = table - without
        assert np.abs(moved).sum() == moved.sum() == 1


def test_records_that_cannot_be_read_have_no_vote_and_labels_outside_are_refused():
    features, labels, candidates = case()
    features[3] = np.nan
    labels[5] = SKIPPED
    assert table_of(features, labels, candidates).sum() == len(labels) - 2
    labels[7] = CLASSES
    with pytest.raises(DataError):
        table_of(features, labels, candidates)


def one_draw_a_class(total, multiplier, stream):
    (votes,) = total.values()
    zeros = ExactSum.zeros([(len(votes), 1)], 1.0)
    return [votes + noisy_sum(zeros, multiplier, stream)[0]]


def check_noise(tmp_path) -> None:
    """Variance of all cells, and of the means of rows and of columns, by chi-square."""
    table = np.random.default_rng(0).integers(0, 90, (40, 80))
    check_drawn((release_table(table, releaser_of("vote", tmp_path)) - table) / 4.0)


def test_noise_is_as_planned(tmp_path):
    check_noise(tmp_path)


@pytest.mark.parametrize("mechanism", [without_noise, half_the_noise, one_draw_a_class])
def test_broken_twins_are_rejected(tmp_path, monkeypatch, mechanism):
    monkeypatch.setattr(noise_module, "noisy_sum", mechanism)
    with pytest.raises(AssertionError):
        check_noise(tmp_path)


def test_the_same_table_is_a_free_replay_and_another_one_is_refused(tmp_path):
    releaser = releaser_of("vote", tmp_path, epsilon=0.9, noise=5.0)
    table = np.arange(28).reshape(4, 7)
    first = release_table(table, releaser)
    assert np.array_equal(release_table(table, releaser), first)
    assert [event.replay for event in releaser.ledger.events()] == [False, True]
    other = table.copy()
    other[0, 0] += 1
    with pytest.raises(BudgetError):
        release_table(other, releaser)


def test_each_class_gets_a_candidate_of_its_own_with_the_most_votes_in_all():
    votes = np.array([[9.0, 8.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, -5.0]])
    assert assignment(votes) == [1, 0, 2]


def test_whitening_makes_the_spread_of_one_candidates_images_alike_in_all_directions():
    rng = np.random.default_rng(0)
    scale = np.array([10.0, 1.0, 3.0])
    shown = rng.normal(size=(20, 50, 3)) * scale + rng.normal(size=(20, 1, 3)) * 100
    white = Whitening.of(shown)(shown)
    rest = (white - white.mean(1, keepdims=True)).reshape(-1, 3)
    spread = rest.std(0)
    assert spread.max() < 1.3 and spread.max() / spread.min() < 3


def test_classes_that_neither_candidates_nor_features_hold_get_look_alikes(tmp_path):
    """Digits, by letters alone, in the latents of a VAE; with the noise that a plan would give."""
    pipe = load_pipeline("glyphs-tiny")
    prompts = [prompt for prompt in known_prompts("glyphs-tiny") if "uppercase" in prompt]
    conditions = encode_conditions(pipe, prompts)
    features = LatentSpace(model=ModelConfig(path="glyphs-tiny"))
    shown = [
        features(
            sample_images(
                pipe,
                conditions[part].repeat_interleave(8),
                null=conditions[:1],
                seeds=range(8 * len(part)),
                steps=6,
                guidance_scale=1.0,
            )
        )
        for part in torch.arange(len(prompts)).split(13)
    ]
    images, labels = open_source(DataConfig(source="digits")).read(
        "train", np.arange(400), resolution=32
    )
    means = np.concatenate(shown).reshape(len(prompts), 8, -1)
    whiten = Whitening.of(means)
    table = vote_table(
        [(features(images), labels)], whiten(means).mean(1), whiten=whiten, n_classes=10
    )
    chosen = assignment(release_table(table, releaser_of("vote", tmp_path, noise=3.0)))
    letters = [prompts[candidate][-1] for candidate in chosen]
    assert letters[0] in "OQCDU" and letters[1] in "IJLT" and letters[6] in "GCQ"
    share = table[np.arange(10), chosen].sum() / table.sum()
    assert share > 0.15, "four times what chance would give"
