"""The one place that touches records: their nearest-neighbour votes, released as one noisy
histogram.

Each record gives one vote, to the candidate of its own class that is nearest in the embedding.
Adding or removing a record so moves one count, of all classes' counts together, by one: the whole
vector has L2 sensitivity 1, with lookahead as without. Exact counts exist in the tasks and on the
driver only; noise is drawn once, on the driver, after the ledger has the event.

References:
    1. Lin et al. ICLR 2024, algorithm 2. (DP_NN_HISTOGRAM)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import EvolutionConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import DataError
from sapf_ray.evolution.embedding import Embedding
from sapf_ray.evolution.generation import task_options
from sapf_ray.files import write_array
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.noise import add_gaussian_noise
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.runs import worktime

_DISTANCES_PER_CHUNK = 1 << 22  # 32 MiB of float64
SENSITIVITY = 1.0
STAGE = "evolution"


@dataclass(frozen=True, kw_only=True)
class RecordEmbeddings:
    """The records' embeddings and labels: as sensitive as the images, files of mode 0600.

    Args:
        directory: Private; visible to every node that runs a task.
        n_records: N.
        shard_size: Records per file and task.
    """

    directory: str
    n_records: int
    shard_size: int

    @property
    def shards(self) -> list[np.ndarray]:
        return [
            np.arange(i, min(i + self.shard_size, self.n_records))
            for i in range(0, self.n_records, self.shard_size)
        ]

    def file(self, shard: int) -> Path:
        return Path(self.directory) / f"records-{shard:05d}.npy"

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 (n, d) and labels int64 (n,)."""
        stored = np.load(self.file(shard))
        return stored["embedding"], stored["label"]

    def build(
        self, source: ImageSource, resolution: int, embedding: Embedding, config: EvolutionConfig
    ) -> Iterator[None]:
        """Embeds the missing shards, one Ray task each; yields once for each shard."""
        Path(self.directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        missing = [i for i in range(len(self.shards)) if not self.file(i).exists()]
        yield from [None] * (len(self.shards) - len(missing))
        shared, task = (
            ray.put((source, embedding)),
            task_options(_embed_records, "embed records", config=config),
        )
        window = cluster.in_flight(config.cpus_per_task, config.gpus_per_task)
        for _ in cluster.as_finished(
            lambda i: task.remote(shared, self, i, resolution, config.cpus_per_task),
            missing,
            window=window,
        ):
            yield None


@ray.remote(max_retries=3)
@worktime.timed
def _embed_records(
    shared: tuple[ImageSource, Embedding],
    records: RecordEmbeddings,
    shard: int,
    resolution: int,
    cpus: float,
) -> None:
    torch.set_num_threads(max(1, int(cpus)))
    source, embedding = shared
    images, labels = source.read("train", records.shards[shard], resolution=resolution)
    embeddings = embedding(images)
    table = np.empty(
        len(labels), [("embedding", np.float32, embeddings.shape[1:]), ("label", np.int64)]
    )
    table["embedding"], table["label"] = embeddings, labels
    write_array(records.file(shard), table, mode=0o600)


def count_votes(
    candidates: np.ndarray, n_classes: int, *, embeddings: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Votes of each candidate, by Euclidean distance; equal candidates' votes go to the first of
    them.

    Distances are in float64 and equal candidates are compared once, so a vote does not hang on the
    rounding of a matrix product, which differs from one batch shape to another.

    Args:
        candidates: (m, d) float32; candidate i is of class i mod ``n_classes``.
        embeddings: (n, d) float32 of the records.
        labels: (n,) int64 in [0, n_classes).

    Returns:
        int64 (m,), summing to n.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise DataError(f"a record's label lies outside [0, {n_classes})")
    votes = np.zeros(len(candidates), np.int64)
    candidates = candidates + np.float32(0)  # -0.0 becomes 0.0: equal rows have equal bytes
    for label in range(n_classes):
        own = np.flatnonzero(labels == label)
        slots = np.arange(label, len(candidates), n_classes)
        firsts = {candidates[slot].tobytes(): slot for slot in slots[::-1]}
        slots = np.sort(np.fromiter(firsts.values(), np.int64))
        of_class = torch.from_numpy(candidates[slots]).double()
        centre = of_class.mean(0)
        of_class = of_class - centre
        squares = of_class.square().sum(1)
        rows = max(1, _DISTANCES_PER_CHUNK // len(slots))
        for start in range(0, len(own), rows):
            x = torch.from_numpy(embeddings[own[start : start + rows]]).double() - centre
            nearest = torch.addmm(squares, x, of_class.T, alpha=-2).argmin(1)
            votes[slots] += torch.bincount(nearest, minlength=len(slots)).numpy()
    return votes


@ray.remote(max_retries=3)
@worktime.timed
def _vote(
    candidates: np.ndarray, n_classes: int, records: RecordEmbeddings, shard: int, cpus: float
) -> np.ndarray:
    torch.set_num_threads(max(1, int(cpus)))
    embeddings, labels = records.read(shard)
    return count_votes(candidates, n_classes, embeddings=embeddings, labels=labels)


def all_votes(
    candidates: np.ndarray,
    n_classes: int,
    *,
    records: RecordEmbeddings,
    config: EvolutionConfig,
    on_shard: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Exact votes int64 (m,) of all records: sensitive. One Ray task per shard; sums of integers,
    in any order.
    """
    shared = ray.put(candidates)
    task = _vote.options(
        name="vote", num_cpus=config.cpus_per_task, scheduling_strategy=cluster.SPREAD
    )
    total = np.zeros(len(candidates), np.int64)
    parts = cluster.as_finished(
        lambda i: task.remote(shared, n_classes, records, i, config.cpus_per_task),
        range(len(records.shards)),
        window=cluster.in_flight(config.cpus_per_task),
    )
    for _, part in parts:
        total += part
        on_shard()
    return total


def release_histogram(
    votes: np.ndarray,
    iteration: int,
    *,
    stage: StagePlan,
    key: NoiseKey,
    stream: str,
    ledger: Ledger,
    non_private: bool = False,
) -> np.ndarray:
    """Pays, then adds noise: the only way from exact votes to anything else.

    Both the ledger's fingerprint and the noise stream carry the exact votes, through the secret
    key: the same votes again are an exact replay, free and with the same noise; other votes under
    the same name (records embedded again on other hardware, say) would be a second release, charged
    and with noise of its own.

    Args:
        votes: int64 (m,), exact.
        iteration: In [0, stage.count).
        stage: Noise multiplier and event.
        stream: Fingerprint of key, plan and data.

    Returns:
        float32 (m,).

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    digest = hashlib.sha256(np.ascontiguousarray(votes, "<i8").tobytes()).hexdigest()
    ledger.record(
        f"{STAGE}/histogram/{iteration}",
        stage.event(),
        key.stream_id(stream, STAGE, iteration, digest),
        STAGE,
    )
    noise = key.stream("evolution/histogram", iteration, int(digest[:32], 16))
    noisy = add_gaussian_noise(
        torch.from_numpy(votes).float(),
        stage.noise_multiplier,
        SENSITIVITY,
        noise,
        non_private=non_private,
    )
    return noisy.numpy()
