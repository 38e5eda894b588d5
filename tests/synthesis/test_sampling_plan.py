from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sapf_ray.synthesis.sampling_plan import SamplingPlan, image_seed


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
