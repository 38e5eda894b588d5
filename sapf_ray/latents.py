"""The latent cache: VAE posterior moments and conditions (prompt embeddings or label ids), computed
once.

The moments are as sensitive as the images: files are mode 0600 inside the run directory's private
folder, or in one that the runs of a grid share, and are deleted at the end (design rule 8). Moments
rather than samples are kept, so that training still draws a fresh latent each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig
from sapf_ray.data.base import SKIPPED, ImageSource
from sapf_ray.data.units import Units
from sapf_ray.files import only_one, short_hash, write_array
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import kept_pipeline, resolution_of
from sapf_ray.models.public_features import Features, posterior_moments
from sapf_ray.runs import worktime

BATCH = 64  # images that the VAE encodes together
CONDITIONS = "conditions.safetensors"


@dataclass(frozen=True)
class LatentCache:
    """Paths and public shapes; opening it reads nothing.

    Attributes:
        directory: Holds ``moments.npy`` (N, 2C, h, w) float32, ``labels.npy`` (N,) int64,
            ``conditions.safetensors`` the classes' conditions. Where a run grounds its classes
            also ``features.npy`` (N, d) float32, what a public network says of each image.
        conditions: Name of the file that is read in place of ``conditions.safetensors``, where
            grounding gave the classes other prompts than the source's.
        units: File that says which images are one group's (:class:`Units`); empty where each image
            is a unit of privacy.
    """

    directory: str
    conditions: str = CONDITIONS
    units: str = ""

    @property
    def groups(self) -> Units | None:
        """Which images are one group's; None where each is a unit of privacy."""
        return Units.load(self.units) if self.units else None

    @property
    def complete(self) -> bool:
        return all(
            (Path(self.directory) / name).is_file()
            for name in ("moments.npy", "labels.npy", CONDITIONS)
        )

    @property
    def has_features(self) -> bool:
        return (Path(self.directory) / "features.npy").is_file()

    def read(self, records: np.ndarray) -> tuple[torch.Tensor, Conditions]:
        """Moments (n, 2C, h, w) and conditions of the given n records."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        return torch.from_numpy(moments[records]), self.all_conditions()[self.labels(records)]

    def labels(self, records: np.ndarray) -> torch.Tensor:
        """Classes int64 (n,) of the given records."""
        labels = np.load(Path(self.directory) / "labels.npy", mmap_mode="r")
        return torch.from_numpy(labels[records])

    def counted_labels(self) -> np.ndarray:
        """Classes int64 (n,) of all records; ``SKIPPED`` where an image could not be read: such a
        record counts for nothing.
        """
        labels = np.load(Path(self.directory) / "labels.npy")
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        first = moments.reshape(len(labels), -1)[:, 0]
        return np.where(np.isnan(first), SKIPPED, labels)

    def all_conditions(self) -> Conditions:
        """The public condition of each class."""
        return Conditions.load(Path(self.directory) / self.conditions)

    def record_features(self, block: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Public features of all records, as sensitive as the images.

        Args:
            block: Records that are in memory together.

        Yields:
            Features float32 (n, d) and labels int64 (n,), in the records' order; the label is
            ``SKIPPED`` where an image could not be read, and such a record counts for nothing.
        """
        features = np.load(Path(self.directory) / "features.npy", mmap_mode="r")
        labels = np.load(Path(self.directory) / "labels.npy", mmap_mode="r")
        for start in range(0, len(labels), block):
            rows = np.array(features[start : start + block])
            read = np.isfinite(rows).all(1)
            yield rows, np.where(read, labels[start : start + block], SKIPPED)

    def group_features(
        self, block: int = 256
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As :meth:`record_features`, group by group; only where the cache has groups.

        Args:
            block: Groups that are in memory together.

        Yields:
            Features and labels of all images of some groups, and which group each is of: int64
            (n,) from 0 in every block.
        """
        features = np.load(Path(self.directory) / "features.npy", mmap_mode="r")
        labels = np.load(Path(self.directory) / "labels.npy", mmap_mode="r")
        groups = self.groups
        assert groups is not None
        for first in range(0, len(groups), block):
            starts = groups.starts[first : first + block + 1]
            images = groups.images[starts[0] : starts[-1]]
            rows = np.array(features[images])
            found = np.where(np.isfinite(rows).all(1), labels[images], SKIPPED)
            yield rows, found, np.repeat(np.arange(len(starts) - 1), np.diff(starts))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        return (moments.shape[1] // 2, *moments.shape[2:])

    def any_conditions(self, n: int) -> Conditions:
        """n conditions in the shape of the records'; reads no record."""
        return self.all_conditions()[:1].repeat_interleave(n)


class Reading(NamedTuple):
    """How tasks read and encode records: source, public model, GPUs a task, public features."""

    source: ImageSource
    model: ModelConfig
    gpus: float
    features: Features | None


@ray.remote(max_retries=3)
@worktime.timed
def _encode_shard(
    reading: Reading, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Moments float32 (n, 2C, h, w), labels int64 (n,) and features (n, d) of n records."""
    source, model, gpus, features = reading
    pipe = kept_pipeline(model, pick_device(gpus))
    images, labels = source.read("train", records, resolution=resolution_of(pipe))
    batches = np.array_split(images, max(1, -(-len(images) // BATCH)))
    encoded = np.concatenate([posterior_moments(pipe.vae, batch) for batch in batches])
    seen = None if features is None else features(images, encoded)
    # a gradient that is not a number is clipped to zero: the record contributes nothing
    encoded[labels == SKIPPED] = np.nan
    if seen is not None:
        seen[labels == SKIPPED] = np.nan
    return encoded, labels.clip(min=0), seen


def with_prompts(
    cache: LatentCache,
    prompts: Sequence[str],
    *,
    model: ModelConfig,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> LatentCache:
    """The same records under other prompts: no further pass over the images.

    Args:
        cache: A complete cache.
        prompts: One per class.
        model: The public model; one task loads it, unless the prompts were encoded before.
        cpus: Cores of the task.
        gpus: GPUs of the task.
    """
    name = f"conditions-{short_hash([list(prompts), model.class_labels])}.safetensors"
    path = Path(cache.directory) / name
    if not path.exists():
        task = _encode_prompts.options(name="prompts", num_cpus=cpus, num_gpus=gpus)
        cluster.result(task.remote(model, gpus, tuple(prompts))).save(path, mode=0o600)
    return replace(cache, conditions=name)


@ray.remote(max_retries=3)
@worktime.timed
def _encode_prompts(model: ModelConfig, gpus: float, prompts: Sequence[str]) -> Conditions:
    """The condition of each class, see :func:`encode_conditions`."""
    pipe = kept_pipeline(model, pick_device(gpus))
    return encode_conditions(pipe, prompts, class_labels=model.class_labels)


def build_latent_cache(
    directory: Path,
    source: ImageSource,
    *,
    model: ModelConfig,
    shard_size: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    features: Features | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encodes all training images, one Ray task per shard, into ``directory``.

    Each image is decoded once, whatever is made of it.

    Args:
        directory: Folder of the cache; an earlier run may have filled it.
        source: The images.
        model: The public model; only the tasks load it.
        shard_size: Records per task; the driver holds one shard at a time.
        cpus: Cores of a task.
        gpus: GPUs of a task; 0 encodes on the CPU.
        features: Public features that are kept beside the latents, if any.
        on_progress: Called with (shards done, shards in all).
    """
    cache = LatentCache(str(directory))
    with only_one(directory):
        if not cache.complete or (features is not None and not cache.has_features):
            _build(
                directory,
                source,
                model=model,
                shard_size=shard_size,
                cpus=cpus,
                gpus=gpus,
                features=features,
                on_progress=on_progress or (lambda done, total: None),
            )
    return cache


def _build(
    directory: Path,
    source: ImageSource,
    *,
    model: ModelConfig,
    shard_size: int,
    cpus: float,
    gpus: float,
    features: Features | None,
    on_progress: Callable[[int, int], None],
) -> None:
    """Writes the files of :class:`LatentCache`; parameters as :func:`build_latent_cache`."""
    placed = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": cluster.SPREAD}
    conditions = _encode_prompts.options(name="prompts", **placed).remote(
        model, gpus, source.prompts
    )
    shards = np.array_split(np.arange(source.n_train), max(1, -(-source.n_train // shard_size)))
    # ImageSource may be large (a list of 300,000 paths): by reference, not pickled into every task
    shared = ray.put(Reading(source, model, gpus, features))
    task = _encode_shard.options(name="encode", **placed)
    encoded = cluster.as_finished(
        lambda shard: task.remote(shared, shard),
        shards,
        window=cluster.in_flight(cpus, gpus),
    )
    tables = {"moments": _Table(directory / "moments.npy", source.n_train)}
    if features is not None:
        tables["features"] = _Table(directory / "features.npy", source.n_train)
    labels = np.empty(source.n_train, np.int64)
    for done, (shard, (moments, shard_labels, seen)) in enumerate(encoded, 1):
        tables["moments"].fill(shard, moments)
        if features is not None:
            tables["features"].fill(shard, seen)
        labels[shard] = shard_labels
        on_progress(done, len(shards))
    cluster.result(conditions).save(directory / CONDITIONS, mode=0o600)
    write_array(directory / "labels.npy", labels, mode=0o600)
    for table in reversed(tables.values()):
        table.finish()


class _Table:
    """A private ``.npy`` of float32 that is filled shard by shard and has its name once whole."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.stem}.partial.npy")
        self.rows = rows
        self.values: np.memmap | None = None

    def fill(self, rows: np.ndarray, values: np.ndarray) -> None:
        if self.values is None:
            _touch_private(self.partial)
            shape = (self.rows, *values.shape[1:])
            self.values = np.lib.format.open_memmap(self.partial, "w+", np.float32, shape)
        self.values[rows] = values

    def finish(self) -> None:
        assert self.values is not None
        self.values.flush()
        self.values = None
        os.replace(self.partial, self.path)


def _touch_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
