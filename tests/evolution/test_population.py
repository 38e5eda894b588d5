from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from sapf_ray.config import EvolutionConfig
from sapf_ray.evolution.population import (
    SELECTIONS,
    by_rank,
    by_sampling,
    kept_slots,
    next_parents,
    slot_seeds,
    threshold_votes,
)
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from tests.evolution.toy import AUG_PE

RNG = np.random.default_rng


def test_threshold_takes_off_and_cuts_at_zero():
    assert threshold_votes(np.array([5.0, 2.0, 1.9, -3.0], np.float32), 2.0).tolist() == [
        3.0,
        0.0,
        0.0,
        0.0,
    ]


def test_sampling_is_in_proportion_to_votes():
    weights = np.array([0.0, 1.0, 3.0, 0.0, 4.0])
    counts = np.bincount(by_sampling(weights, 8000, RNG(0)), minlength=5)
    assert counts[0] == counts[3] == 0
    assert chisquare(counts[[1, 2, 4]], [1000, 3000, 4000]).pvalue > 1e-4
    assert (
        chisquare(counts[[1, 2, 4]], [8000 / 3] * 3).pvalue < 1e-4
    )  # the same check says no to uniform


def test_rank_takes_the_heaviest_and_goes_round_again():
    assert by_rank(np.array([1.0, 5.0, 0.0, 3.0]), 2, RNG(0)).tolist() == [1, 3]
    assert by_rank(np.array([1.0, 5.0, 0.0, 3.0]), 5, RNG(0)).tolist() == [1, 3, 0, 1, 3]


def test_sampling_without_any_vote_is_uniform():
    counts = np.bincount(by_sampling(np.zeros(4), 4000, RNG(0)), minlength=4)
    assert chisquare(counts).pvalue > 1e-4


def test_rank_without_any_vote_is_a_random_choice():
    chosen = [by_rank(np.zeros(6), 3, RNG(i)) for i in range(50)]
    assert all(len(set(c)) == 3 for c in chosen) and len({tuple(c) for c in chosen}) > 20


@pytest.mark.parametrize("selection", sorted(SELECTIONS))
@pytest.mark.parametrize("keep", [False, True])
def test_parents_are_of_the_slots_class_and_as_many_as_planned(selection, keep):
    config = EvolutionConfig(
        iterations=3, population=4, variations=2, keep_selected=keep, selection=selection
    )
    weights = RNG(0).exponential(size=config.candidates * 5)
    middle, last = (
        next_parents(weights, 5, config=config, n_images=37, seed=1, iteration=i) for i in (0, 2)
    )
    assert len(middle) == 4 * (2 + keep) * 5 and len(last) == 37
    for parents in (middle, last):
        assert np.array_equal(parents % 5, np.arange(len(parents)) % 5)
    for label in range(5):
        _, counts = np.unique(middle[label::5], return_counts=True)
        assert (counts % (2 + keep) == 0).all()  # each selected parent takes all its slots


def test_votes_of_one_class_do_not_move_another():
    config = EvolutionConfig(iterations=3, population=10)
    weights = RNG(0).exponential(size=20)
    other = weights.copy()
    other[1::2] = other[1::2][::-1]
    first, second = (
        next_parents(w, 2, config=config, n_images=60, seed=1, iteration=0)
        for w in (weights, other)
    )
    assert np.array_equal(first[::2], second[::2]) and not np.array_equal(first[1::2], second[1::2])


def test_iterations_choose_independently_and_repeatably():
    config = EvolutionConfig(iterations=9, population=30)
    a, again, b = (
        next_parents(np.ones(60), 2, config=config, n_images=60, seed=1, iteration=i)
        for i in (0, 0, 1)
    )
    assert np.array_equal(a, again) and not np.array_equal(a, b)


def test_a_parent_is_kept_once_and_only_where_asked():
    parents = np.array([3, 3, 1, 3, 1, 0])
    assert kept_slots(parents, EvolutionConfig(**AUG_PE)).tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
    ]
    assert not kept_slots(parents, EvolutionConfig()).any()


def test_seeds_are_distinct_and_begin_as_those_of_a_data_set():
    slots = np.arange(50)
    plan = SamplingPlan(n_images=50, n_classes=3, shard_size=50, seed=9)
    assert np.array_equal(slot_seeds(9, 0, purpose=0, slots=slots), plan.seeds(plan.shards[0]))
    seeds = [
        slot_seeds(9, generation, purpose=purpose, slots=slots)
        for generation in range(4)
        for purpose in range(3)
    ]
    assert len(np.unique(seeds)) == 12 * 50 and np.min(seeds) >= 0
    assert np.array_equal(
        slot_seeds(9, 2, purpose=1, slots=slots[7:9]), slot_seeds(9, 2, purpose=1, slots=slots)[7:9]
    )
