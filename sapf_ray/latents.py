"""The latent cache: VAE posterior moments and conditions (prompt embeddings or label ids), computed
once.

The moments are as sensitive as the images: files are mode 0600 inside the run directory's private
folder, or in one that the runs of a grid share, and are deleted at the end (design rule 8). Moments
rather than samples are kept, so that training still draws a fresh latent each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig
from sapf_ray.data.base import SKIPPED, ImageSource
from sapf_ray.files import only_one, short_hash, write_array
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import kept_pipeline, native_resolution
from sapf_ray.runs import worktime

BATCH = 64  # images that the VAE encodes together


@dataclass(frozen=True)
class LatentCache:
    """Paths and public shapes; opening it reads nothing.

    Attributes:
        directory: Holds ``moments.npy`` (N, 2C, h, w) float32, ``labels.npy`` (N,) int64,
            ``conditions.npy`` (classes, L, d) float32 prompt embeddings, or (classes,) int64 label
            ids.
        conditions: Name of the file that is read in place of ``conditions.npy``, where grounding
            gave the classes other prompts than the source's.
    """

    directory: str
    conditions: str = "conditions.npy"

    @property
    def complete(self) -> bool:
        return all(
            (Path(self.directory) / f"{name}.npy").is_file()
            for name in ("moments", "labels", "conditions")
        )

    def read(self, records: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments (n, 2C, h, w) and conditions (n, ...) of the given records."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        return torch.from_numpy(moments[records]), self.all_conditions()[self.labels(records)]

    def labels(self, records: np.ndarray) -> torch.Tensor:
        """Classes int64 (n,) of the given records."""
        labels = np.load(Path(self.directory) / "labels.npy", mmap_mode="r")
        return torch.from_numpy(labels[records])

    def all_conditions(self) -> torch.Tensor:
        """(classes, ...) public conditions."""
        return torch.from_numpy(np.load(Path(self.directory) / self.conditions))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        return (moments.shape[1] // 2, *moments.shape[2:])

    def any_conditions(self, n: int) -> torch.Tensor:
        """(n, ...) conditions in the shape of the records'; reads no record."""
        condition = self.all_conditions()[:1]
        return condition.repeat(n, *[1] * (condition.ndim - 1))


@ray.remote(max_retries=3)
@worktime.timed
def _encode_shard(
    source: ImageSource, model: ModelConfig, gpus: float, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moments float32 (n, 2C, h, w) and labels int64 (n,) of n records."""
    device = pick_device(gpus)
    pipe = kept_pipeline(model, device)
    images, labels = source.read("train", records, resolution=native_resolution(pipe))
    moments = []
    with torch.no_grad():
        for batch in np.array_split(images, max(1, -(-len(images) // BATCH))):
            pixels = torch.from_numpy(batch).to(device, pipe.vae.dtype).permute(0, 3, 1, 2)
            posterior = pipe.vae.encode(pixels / 127.5 - 1).latent_dist
            moments.append(posterior.parameters.float().cpu().numpy())
    encoded = np.concatenate(moments)
    # a gradient that is not a number is clipped to zero: the record contributes nothing
    encoded[labels == SKIPPED] = np.nan
    return encoded, labels.clip(min=0)


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
    name = f"conditions-{short_hash([list(prompts), model.class_labels])}.npy"
    path = Path(cache.directory) / name
    if not path.exists():
        task = _encode_prompts.options(name="prompts", num_cpus=cpus, num_gpus=gpus)
        conditions = cluster.result(task.remote(model, gpus, tuple(prompts)))
        write_array(path, conditions, mode=0o600)
    return LatentCache(cache.directory, name)


@ray.remote(max_retries=3)
@worktime.timed
def _encode_prompts(model: ModelConfig, gpus: float, prompts: Sequence[str]) -> np.ndarray:
    """The condition of each class, see :func:`encode_conditions`."""
    pipe = kept_pipeline(model, pick_device(gpus))
    return encode_conditions(pipe, prompts, class_labels=model.class_labels).numpy()


def build_latent_cache(
    directory: Path,
    source: ImageSource,
    *,
    model: ModelConfig,
    shard_size: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encodes all training images, one Ray task per shard, into ``directory``.

    Args:
        directory: Folder of the cache; an earlier run may have filled it.
        source: The images.
        model: The public model; only the tasks load it.
        shard_size: Records per task; the driver holds one shard at a time.
        cpus: Cores of a task.
        gpus: GPUs of a task; 0 encodes on the CPU.
        on_progress: Called with (shards done, shards in all).
    """
    cache = LatentCache(str(directory))
    with only_one(directory):
        if not cache.complete:
            _build(
                directory,
                source,
                model=model,
                shard_size=shard_size,
                cpus=cpus,
                gpus=gpus,
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
    on_progress: Callable[[int, int], None],
) -> None:
    """Writes the three files of :class:`LatentCache`; parameters as :func:`build_latent_cache`."""
    placed = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": cluster.SPREAD}
    conditions = _encode_prompts.options(name="prompts", **placed).remote(
        model, gpus, source.prompts
    )
    shards = np.array_split(np.arange(source.n_train), max(1, -(-source.n_train // shard_size)))
    # ImageSource may be large (a list of 300,000 paths): by reference, not pickled into every task
    source_ref = ray.put(source)
    task = _encode_shard.options(name="encode", **placed)
    encoded = cluster.as_finished(
        lambda shard: task.remote(source_ref, model, gpus, shard),
        shards,
        window=cluster.in_flight(cpus, gpus),
    )
    moments: np.memmap | None = None
    labels = np.empty(source.n_train, np.int64)
    partial = directory / "moments.partial.npy"
    for done, (shard, (values, shard_labels)) in enumerate(encoded, 1):
        if moments is None:
            _touch_private(partial)
            shape = (source.n_train, *values.shape[1:])
            moments = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        moments[shard] = values
        labels[shard] = shard_labels
        on_progress(done, len(shards))
    assert moments is not None
    moments.flush()
    del moments
    write_array(directory / "conditions.npy", cluster.result(conditions), mode=0o600)
    write_array(directory / "labels.npy", labels, mode=0o600)
    os.replace(partial, directory / "moments.npy")


def _touch_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
