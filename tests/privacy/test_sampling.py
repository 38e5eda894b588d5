"""The sampler is what the accountant assumes, and the test that says so rejects samplers that are
not.
"""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.sampling import poisson_sample, shard

N, RATE, STEPS = 400, 0.1, 2000
KEY = NoiseKey(bytes(range(32)))


def poisson(step: int) -> np.ndarray:
    return poisson_sample(N, RATE, stream=KEY.stream("sample", step))


def fixed_size(step: int) -> np.ndarray:
    return np.random.default_rng(step).permutation(N)[: int(N * RATE)]


def shuffled_epochs(step: int) -> np.ndarray:
    per_epoch = int(1 / RATE)
    order = np.random.default_rng(step // per_epoch).permutation(N)
    return order[step % per_epoch :: per_epoch]


def random_size_shuffled(step: int) -> np.ndarray:
    """Right batch sizes, yet a record never comes twice within an epoch."""
    per_epoch = int(1 / RATE)
    rng = np.random.default_rng(step // per_epoch)
    return np.flatnonzero(rng.integers(per_epoch, size=N) == step % per_epoch)


def frozen(step: int) -> np.ndarray:
    return poisson(0)


def check_poisson(sampler) -> None:
    """Asserts that each record is in each step with rate q, independently of records and steps."""
    included = np.zeros((STEPS, N), dtype=bool)
    for step in range(STEPS):
        included[step, sampler(step)] = True
    x = (included - RATE) / np.sqrt(RATE * (1 - RATE))  # mean 0, variance 1 under Poisson sampling
    bound = 5.0  # standard deviations
    assert abs(included.sum(1).mean() - N * RATE) < bound * np.sqrt(
        N * RATE * (1 - RATE) / STEPS
    ), "mean batch size"
    variance = included.sum(1).var() / (N * RATE * (1 - RATE))
    assert abs(variance - 1) < bound * np.sqrt(2 / STEPS), (
        "variance of the batch size is not N q (1 - q)"
    )
    assert np.abs(x.mean(0)).max() < (bound + 1) / np.sqrt(STEPS), "a record's rate"
    pairs = (x.T @ x / STEPS)[~np.eye(N, dtype=bool)]
    assert np.abs(pairs).max() < (bound + 2) / np.sqrt(STEPS), "two records depend on each other"
    for lag in range(1, 10):
        between = (x[lag:] * x[:-lag]).mean()
        assert abs(between) < bound / np.sqrt(N * (STEPS - lag)), (
            "a record's inclusion depends on earlier steps"
        )


@pytest.mark.parametrize("sampler", [poisson])
def test_sampling_is_poisson(sampler):
    check_poisson(sampler)


@pytest.mark.parametrize("twin", [fixed_size, shuffled_epochs, random_size_shuffled, frozen])
def test_broken_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_poisson(twin)


def test_the_same_step_is_the_same_sample():
    assert (poisson(3) == poisson(3)).all() and len(poisson(3)) != 0
    assert set(poisson(3)) != set(poisson(4))


def test_rate_one_takes_all_and_tiny_rates_may_take_none():
    assert (poisson_sample(10, 1.0, stream=KEY.stream("a")) == np.arange(10)).all()
    assert len(poisson_sample(10, 1e-12, stream=KEY.stream("a"))) == 0


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rates_outside_the_unit_interval(rate):
    with pytest.raises(ValueError):
        poisson_sample(10, rate, stream=KEY.stream("a"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_shards_are_disjoint_and_complete(world_size):
    batch = poisson(0)
    parts = [shard(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == list(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rank_outside_the_world():
    with pytest.raises(ValueError):
        shard(np.arange(3), 2, 2)
