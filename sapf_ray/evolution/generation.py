"""A generation of synthetic samples on disk, made and embedded shard by shard in Ray tasks.

A shard is one file that is whole or not there, and follows from public numbers alone: the parents'
file, the strength and the seeds. So an interrupted generation goes on where it stopped, on any
number of workers. The directory must be visible to every node that runs a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import EvolutionConfig
from sapf_ray.errors import SapfError
from sapf_ray.evolution.api import Api
from sapf_ray.evolution.embedding import Embedding
from sapf_ray.evolution.population import kept_slots, slot_seeds
from sapf_ray.files import write_array
from sapf_ray.runs import worktime


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Where a generation lies and how large it is; opening it reads nothing.

    Args:
        directory: Holds ``samples-*.npy``, ``embeddings-*.npy`` and, but in generation 0,
            ``parents.npy``.
        index: 0 is fresh from the public model.
        size: Slots; slot i has label i mod ``n_classes``.
        shard_size: Slots per file.
    """

    directory: str
    index: int
    size: int
    n_classes: int
    shard_size: int

    @property
    def shards(self) -> list[np.ndarray]:
        """The slots of each file."""
        return [
            np.arange(i, min(i + self.shard_size, self.size))
            for i in range(0, self.size, self.shard_size)
        ]

    @property
    def parents_file(self) -> Path:
        return Path(self.directory) / "parents.npy"

    @property
    def complete(self) -> bool:
        return all(self.file("samples", i).exists() for i in range(len(self.shards)))

    def file(self, kind: str, shard: int) -> Path:
        return Path(self.directory) / f"{kind}-{shard:05d}.npy"

    def labels(self, slots: np.ndarray) -> np.ndarray:
        """int64 (n,)."""
        return np.asarray(slots, np.int64) % self.n_classes

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Samples (n, ...) of the given slots, in their order."""
        slots = np.asarray(slots)
        rows: np.ndarray | None = None
        for shard in np.unique(slots // self.shard_size):
            stored = np.load(self.file("samples", shard), mmap_mode="r")
            here = slots // self.shard_size == shard
            if rows is None:
                rows = np.empty((len(slots), *stored.shape[1:]), stored.dtype)
            rows[here] = stored[slots[here] % self.shard_size]
        assert rows is not None, "no slot asked for"
        return rows

    def embeddings(self) -> np.ndarray:
        """float32 (size, d)."""
        return np.concatenate(
            [np.load(self.file("embeddings", i)) for i in range(len(self.shards))]
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the tasks share; public values only."""

    api: Api
    embedding: Embedding
    config: EvolutionConfig
    seed: int


@ray.remote(max_retries=3)
@worktime.timed
def _make_shard(
    work: Work, generation: Generation, previous: Generation | None, shard: int
) -> None:
    torch.set_num_threads(max(1, int(work.config.cpus_per_task)))
    slots = generation.shards[shard]
    labels, seeds = (
        generation.labels(slots),
        slot_seeds(work.seed, generation.index, purpose=0, slots=slots),
    )
    if previous is None:
        samples = work.api.random(labels, seeds)
    else:
        parents = np.load(generation.parents_file)
        samples = previous.read(parents[slots])
        vary = ~kept_slots(parents, work.config)[slots]
        if vary.any():
            strength = work.config.strength(previous.index)
            samples[vary] = work.api.vary(samples[vary], labels[vary], seeds[vary], strength)
    write_array(generation.file("samples", shard), samples)


@ray.remote(max_retries=3)
@worktime.timed
def _embed_shard(work: Work, generation: Generation, shard: int) -> None:
    torch.set_num_threads(max(1, int(work.config.cpus_per_task)))
    slots = generation.shards[shard]
    samples, labels = generation.read(slots), generation.labels(slots)
    lookahead = work.config.lookahead
    if lookahead == 0:
        embeddings = work.embedding(samples)
    else:
        total: Any = 0.0
        for k in range(1, lookahead + 1):
            seeds = slot_seeds(work.seed, generation.index, purpose=k, slots=slots)
            strength = work.config.strength(generation.index)
            total = total + work.embedding(work.api.vary(samples, labels, seeds, strength)).astype(
                np.float64
            )
        embeddings = (total / lookahead).astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise SapfError(
            f"generation {generation.index}: the embedding of a synthetic image is not finite"
        )
    write_array(generation.file("embeddings", shard), embeddings)


def make_samples(work: Work, generation: Generation, previous: Generation | None) -> Iterator[None]:
    """Makes the missing shards; yields once for each shard, whether done before or now."""
    shared, task = ray.put(work), task_options(_make_shard, "vary", config=work.config)
    yield from _missing(
        generation,
        "samples",
        work.config,
        lambda shard: task.remote(shared, generation, previous, shard),
    )


def embed_candidates(work: Work, generation: Generation) -> Iterator[None]:
    """Embeds the missing shards, with lookahead where configured; yields once for each shard."""
    shared, task = ray.put(work), task_options(_embed_shard, "embed", config=work.config)
    yield from _missing(
        generation, "embeddings", work.config, lambda shard: task.remote(shared, generation, shard)
    )


def _missing(
    generation: Generation, kind: str, config: EvolutionConfig, submit: Callable[[int], Any]
) -> Iterator[None]:
    missing = [i for i in range(len(generation.shards)) if not generation.file(kind, i).exists()]
    yield from [None] * (len(generation.shards) - len(missing))
    for _ in cluster.as_finished(
        submit, missing, window=cluster.in_flight(config.cpus_per_task, config.gpus)
    ):
        yield None


def task_options(task: Any, name: str, *, config: EvolutionConfig) -> Any:
    """The task with the resources that the config gives to one that runs a network."""
    return task.options(
        name=name,
        num_cpus=config.cpus_per_task,
        num_gpus=config.gpus,
        scheduling_strategy=cluster.SPREAD,
    )
