"""Sampling exactly as the accountant assumes.

Poisson sampling includes each record independently with rate q, every step, over the whole data
set. The batch size is random; it is never a divisor and never logged. Fixed-size batches and
shuffled epochs are other mechanisms with other guarantees.

Example::

    stream = key.stream("sample", step)
    batch = poisson_sample(n_records=1_297, sample_rate=256 / 1_297, stream=stream)
    mine = shard(batch, rank, world_size)      # may be empty: the rank takes the step all the same

References:
    1. Mironov, Talwar, Zhang. Rényi DP of the sampled Gaussian mechanism. 2019.
    2. Chua et al. How private are DP-SGD implementations? ICML 2024. (shuffling is not Poisson)
"""

from __future__ import annotations

import math

import numpy as np

from sapf_ray.privacy.keyed_rng import NoiseStream


def poisson_sample(n_records: int, sample_rate: float, *, stream: NoiseStream) -> np.ndarray:
    """Sorted indices of the records of one step; each is in with probability ``sample_rate``,
    independently.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate = {sample_rate!r}: must lie in (0, 1]")
    if sample_rate == 1:
        return np.arange(n_records)
    included = stream.words(n_records) < np.uint64(math.floor(sample_rate * 2.0**64))
    return np.flatnonzero(included)


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's part of the batch; the parts are disjoint and together they are the batch."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}: must lie in [0, {world_size})")
    return indices[rank::world_size]
