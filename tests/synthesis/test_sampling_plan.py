from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sapf_ray.synthesis.sampling_plan import SamplingPlan, image_seed, weighted_labels


@given(
    n_images=st.integers(1, 500),
    n_classes=st.integers(2, 12),
    shard_size=st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_shards_cover_every_image_once_with_even_labels(n_images, n_classes, shard_size, seed):
    plan = SamplingPlan(n_images=n_images, n_classes=n_classes, shard_size=shard_size, seed=seed)
    shards = plan.shards
    assert [s.start for s in shards] == [0, *[s.stop for s in shards[:-1]]] and shards[
        -1
    ].stop == n_images
    assert all(1 <= s.rows <= shard_size for s in shards)
    assert len({s.file for s in shards}) == len(shards)
    counts = np.bincount(np.concatenate([plan.labels(s) for s in shards]), minlength=n_classes)
    assert counts.max() - counts.min() <= 1


def test_an_images_seed_does_not_depend_on_the_shard_size():
    small, large = (
        SamplingPlan(n_images=60, n_classes=3, shard_size=7, seed=4),
        SamplingPlan(n_images=60, n_classes=3, shard_size=60, seed=4),
    )
    joined = np.concatenate([small.seeds(s) for s in small.shards])
    assert np.array_equal(joined, large.seeds(large.shards[0]))
    assert len(set(joined.tolist())) == 60 and joined.min() >= 0


def test_seeds_of_two_data_sets_share_nothing():
    assert not {image_seed(0, i) for i in range(1000)} & {image_seed(1, i) for i in range(1000)}


@given(
    weights=st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(any),
    n_images=st.integers(1, 300),
)
def test_weighted_labels_follow_the_weights_at_every_length(weights, n_images):
    labels = weighted_labels(tuple(map(float, weights)), n_images)
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(np.eye(len(weights))[labels], axis=0)
    ahead = counts - shares * np.arange(1, n_images + 1)[:, None]
    assert ahead.max() < 1 and ahead.min() > -np.log(len(weights)) - 1
    assert np.array_equal(labels, weighted_labels(tuple(map(float, weights)), 300)[:n_images])
    assert not counts[-1][shares == 0].any()


def test_equal_weights_go_round_the_classes():
    plan = SamplingPlan(n_images=20, n_classes=3, shard_size=20, seed=0)
    weighted = SamplingPlan(n_images=20, n_classes=3, shard_size=20, seed=0, weights=(0.1,) * 3)
    (shard,) = plan.shards
    assert np.array_equal(plan.labels(shard), weighted.labels(shard))
    assert plan.class_counts == weighted.class_counts == [7, 7, 6]
