"""Which image is drawn from which prompt and seed, and in which shard it lies.

All of it follows from four public numbers, so any actor, at any time, makes the same shard.

>>> plan = SamplingPlan(n_images=250, n_classes=10, shard_size=100, seed=0)
>>> [shard.file for shard in plan.shards][-1], plan.shards[-1].rows
('train-00002-of-00003.parquet', 50)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Images ``start`` to ``stop`` (exclusive), counted over the whole data set, and the file they
    go to.
    """

    start: int
    stop: int
    file: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """The synthetic data set, before any image of it is made.

    Args:
        n_images: Images in all.
        n_classes: Classes; labels go round them, so class counts differ by at most one.
        shard_size: Images per shard; the last may be shorter.
        seed: Seed of the whole data set.
    """

    n_images: int
    n_classes: int
    shard_size: int
    seed: int

    @property
    def shards(self) -> list[Shard]:
        count = -(-self.n_images // self.shard_size)
        return [
            Shard(
                start=i * self.shard_size,
                stop=min((i + 1) * self.shard_size, self.n_images),
                # the name `datasets.load_dataset` takes for split "train" of a directory of
                # Parquet files
                file=f"train-{i:05d}-of-{count:05d}.parquet",
            )
            for i in range(count)
        ]

    def labels(self, shard: Shard) -> np.ndarray:
        """int64 (rows,)."""
        return np.arange(shard.start, shard.stop, dtype=np.int64) % self.n_classes

    def seeds(self, shard: Shard) -> np.ndarray:
        """int64 (rows,), one per image."""
        return np.array(
            [image_seed(self.seed, i) for i in range(shard.start, shard.stop)], dtype=np.int64
        )


def image_seed(seed: int, index: int) -> int:
    """Seed in [0, 2**63) of the image at a global index.

    A hash, so that neighbours share nothing.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
