"""Which image is drawn from which prompt and seed, and in which shard it lies.

All of it follows from a few public numbers, so any actor, at any time, makes the same shard. Seed
and label of an image do not depend on how many there are in all: a larger data set begins with the
images of a smaller one.

>>> plan = SamplingPlan(n_images=250, n_classes=10, shard_size=100, seed=0)
>>> [shard.file for shard in plan.shards][-1], plan.shards[-1].rows
('train-00002-of-00003.parquet', 50)
"""

from __future__ import annotations

import functools
import hashlib
import math
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
        n_classes: Number of classes.
        shard_size: Images per shard; the last may be shorter.
        seed: Seed of the whole data set.
        weights: Weight of each class, at least 0 and one above; empty: labels go round the classes,
            so class counts differ by at most one.
        oversample: Candidates per image, at least 1: where images are chosen, more are made.
    """

    n_images: int
    n_classes: int
    shard_size: int
    seed: int
    weights: tuple[float, ...] = ()
    oversample: float = 1.0

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
        if not self.weights:
            return np.arange(shard.start, shard.stop, dtype=np.int64) % self.n_classes
        return weighted_labels(self.weights, self.n_images)[shard.start : shard.stop].copy()

    @property
    def class_counts(self) -> list[int]:
        """Images of each class."""
        counts = sum(np.bincount(self.labels(s), minlength=self.n_classes) for s in self.shards)
        return np.asarray(counts).tolist()

    def seeds(self, shard: Shard) -> np.ndarray:
        """int64 (rows,), one per image."""
        return np.array(
            [image_seed(self.seed, i) for i in range(shard.start, shard.stop)], dtype=np.int64
        )

    def candidate_labels(self, shard: Shard) -> np.ndarray:
        """int64 (m,), m ≥ rows: the images' own labels, then the same again for those made more."""
        return np.resize(self.labels(shard), math.ceil(shard.rows * self.oversample))

    def candidate_seeds(self, shard: Shard) -> np.ndarray:
        """int64 (m,): the images' own seeds, then others; none depends on how many there are."""
        more = math.ceil(shard.rows * self.oversample) - shard.rows
        extra = [image_seed(self.seed, f"{shard.start}+{i}") for i in range(more)]
        return np.concatenate([self.seeds(shard), np.array(extra, dtype=np.int64)])


@functools.lru_cache(maxsize=4)
def weighted_labels(weights: tuple[float, ...], n: int) -> np.ndarray:
    """Labels int64 (n,) whose frequencies follow ``weights`` in every prefix: smooth weighted
    round-robin.

    Every step credits each class with its share and debits the class with most credit, which is
    next, by one. So no class is ever one image or more ahead of its share, whatever the length, and
    equal weights go round the classes.

    >>> weighted_labels((3, 1), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    if len(set(weights)) == 1:
        return np.arange(n, dtype=np.int64) % len(weights)
    shares = np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    credit = np.zeros_like(shares)
    labels = np.empty(n, np.int64)
    for i in range(n):
        credit += shares
        labels[i] = credit.argmax()
        credit[labels[i]] -= 1
    labels.setflags(write=False)
    return labels


def image_seed(seed: int, index: int | str) -> int:
    """Seed in [0, 2**63) of the image at a global index.

    A hash, so that neighbours share nothing.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
