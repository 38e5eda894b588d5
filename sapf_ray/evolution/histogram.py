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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import EvolutionConfig
from sapf_ray.data.base import SKIPPED, ImageSource
from sapf_ray.data.units import Units
from sapf_ray.errors import DataError
from sapf_ray.evolution.embedding import Embedding
from sapf_ray.evolution.generation import task_options
from sapf_ray.files import write_array
from sapf_ray.privacy.fixed_point import ONE_VOTE, ExactSum
from sapf_ray.privacy.release import Releaser
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
        units: File that says which records are one group's (:class:`Units`), which then has one
            vote; empty where each record has its own.
    """

    directory: str
    n_records: int
    shard_size: int
    units: str = ""

    @property
    def whole(self) -> int:
        """What one vote is among the exact votes."""
        return ONE_VOTE if self.units else 1

    def parts(self, shard: int) -> np.ndarray | None:
        """int64 (n,) of each record of a shard in its group's one vote."""
        return Units.load(self.units).parts(ONE_VOTE)[self.shards[shard]] if self.units else None

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
        self, source: ImageSource, *, resolution: int, embedding: Embedding, config: EvolutionConfig
    ) -> Iterator[None]:
        """Embeds the missing shards, one Ray task each; yields once for each shard."""
        Path(self.directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        missing = [i for i in range(len(self.shards)) if not self.file(i).exists()]
        yield from [None] * (len(self.shards) - len(missing))
        shared = ray.put(Reading(source, embedding, resolution, config.cpus_per_task))
        task = task_options(_embed_records, "embed records", config=config)
        finished = cluster.as_finished(
            lambda i: task.remote(shared, self, i),
            missing,
            window=cluster.in_flight(config.cpus_per_task, config.gpus),
        )
        for _ in finished:
            yield None


class Reading(NamedTuple):
    """How tasks read and embed records: source, embedding, side in pixels, CPU cores a task."""

    source: ImageSource
    embedding: Embedding
    resolution: int
    cpus: float


@ray.remote(max_retries=3)
@worktime.timed
def _embed_records(reading: Reading, records: RecordEmbeddings, shard: int) -> None:
    torch.set_num_threads(max(1, int(reading.cpus)))
    images, labels = reading.source.read(
        "train", records.shards[shard], resolution=reading.resolution
    )
    embeddings = reading.embedding(images)
    table = np.empty(
        len(labels), [("embedding", np.float32, embeddings.shape[1:]), ("label", np.int64)]
    )
    table["embedding"], table["label"] = embeddings, labels
    write_array(records.file(shard), table, mode=0o600)


def count_votes(
    candidates: np.ndarray,
    n_classes: int,
    *,
    embeddings: np.ndarray,
    labels: np.ndarray,
    parts: np.ndarray | None = None,
) -> np.ndarray:
    """Votes of each candidate, by Euclidean distance; equal candidates' votes go to the first of
    them.

    Distances are in float64 and equal candidates are compared once, so a vote does not depend on
    the rounding of a matrix product, which differs from one batch shape to another.

    Args:
        candidates: (m, d) float32; candidate i is of class i mod ``n_classes``.
        embeddings: (n, d) float32 of the records.
        labels: (n,) int64 in [0, n_classes), or ``SKIPPED``: that record has no vote.
        parts: (n,) int64 of each record in its group's one vote; None where each has its own.

    Returns:
        int64 (m,), summing to the number of records with a vote, or to their parts.
    """
    if len(labels) and not SKIPPED <= labels.min() <= labels.max() < n_classes:
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
            if parts is None:
                votes[slots] += torch.bincount(nearest, minlength=len(slots)).numpy()
            else:
                np.add.at(votes, slots[nearest.numpy()], parts[own[start : start + rows]])
    return votes


class Ballot(NamedTuple):
    """What records vote on: candidates (m, d), number of classes, CPU cores a task."""

    candidates: np.ndarray
    n_classes: int
    cpus: float


@ray.remote(max_retries=3)
@worktime.timed
def _vote(ballot: Ballot, records: RecordEmbeddings, shard: int) -> np.ndarray:
    torch.set_num_threads(max(1, int(ballot.cpus)))
    embeddings, labels = records.read(shard)
    return count_votes(
        ballot.candidates,
        ballot.n_classes,
        embeddings=embeddings,
        labels=labels,
        parts=records.parts(shard),
    )


def all_votes(
    candidates: np.ndarray,
    n_classes: int,
    *,
    records: RecordEmbeddings,
    config: EvolutionConfig,
    on_shard: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Exact votes of all records: sensitive. One Ray task per shard; integers add in any order.

    Args:
        candidates: (m, d) float32; candidate i is of class i mod ``n_classes``.
        n_classes: Number of classes.
        records: The records' embeddings.
        config: The section ``evolution``.
        on_shard: Called after each shard.

    Returns:
        int64 (m,), summing to N, or where groups vote to at most ``records.whole`` times it.
    """
    shared = ray.put(Ballot(candidates, n_classes, config.cpus_per_task))
    task = _vote.options(
        name="vote", num_cpus=config.cpus_per_task, scheduling_strategy=cluster.SPREAD
    )
    total = np.zeros(len(candidates), np.int64)
    parts = cluster.as_finished(
        lambda i: task.remote(shared, records, i),
        range(len(records.shards)),
        window=cluster.in_flight(config.cpus_per_task),
    )
    for _, part in parts:
        total += part
        on_shard()
    return total


def release_histogram(
    votes: np.ndarray, iteration: int, releaser: Releaser, *, whole: int = 1
) -> np.ndarray:
    """The votes with noise: the only way from exact votes to anything else.

    Votes are integers, so they lie on the grid of an exact sum. The same votes again are an exact
    replay, free and with the same noise; other votes under the same name (records embedded again on
    other hardware, say) are a second release, charged and with noise of its own.

    Args:
        votes: int64 (m,), exact.
        iteration: Number of the histogram, in [0, stage.count).
        releaser: Pays and draws; its plan's ``evolution`` fixes the noise.
        whole: What one vote is among the exact votes, a power of two.

    Returns:
        float32 (m,).

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    votes_on_grid = torch.from_numpy(votes) * (ONE_VOTE // whole)
    total = ExactSum.of([votes_on_grid], SENSITIVITY)
    (noisy,) = releaser.gaussian(f"{STAGE}/histogram/{iteration}", total, stage=STAGE)
    return noisy.float().numpy()
