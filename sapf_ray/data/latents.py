"""The latent cache: VAE posterior moments and prompt embeddings, computed once.

The moments are as sensitive as the images: files are mode 0600 inside the run directory's private
folder, and the run deletes them at its end (design rule 8). Moments rather than samples are kept, so
that training still draws a fresh latent each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.data.base import ImageSource
from sapf_ray.models.loading import load_pipeline, native_resolution


@dataclass(frozen=True)
class LatentCache:
    """Paths and public shapes; opening it reads nothing.

    Attributes:
        directory: Holds ``moments.npy`` (N, 2C, h, w) float32, ``labels.npy`` (N,) int64,
            ``embeddings.npy`` (classes, L, d) float32.
    """

    directory: str

    @property
    def complete(self) -> bool:
        return all((Path(self.directory) / f"{name}.npy").is_file() for name in ("moments", "labels", "embeddings"))

    def read(self, records: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments (n, 2C, h, w) and prompt embeddings (n, L, d) of the given records."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        labels = np.load(Path(self.directory) / "labels.npy", mmap_mode="r")
        embeddings = np.load(Path(self.directory) / "embeddings.npy")
        return torch.from_numpy(moments[records]), torch.from_numpy(embeddings[labels[records]])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        moments = np.load(Path(self.directory) / "moments.npy", mmap_mode="r")
        return (moments.shape[1] // 2, *moments.shape[2:])

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(L, d) of a prompt's embedding."""
        length, width = np.load(Path(self.directory) / "embeddings.npy", mmap_mode="r").shape[1:]
        return length, width


@torch.no_grad()
def encode_prompts(pipe: object, prompts: tuple[str, ...]) -> torch.Tensor:
    """(len(prompts), L, d) float32 text-encoder states; public."""
    tokens = pipe.tokenizer(  # type: ignore[attr-defined]
        list(prompts), padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length,  # type: ignore[attr-defined]
        return_tensors="pt",
    )
    return pipe.text_encoder(tokens.input_ids.to(pipe.device))[0].float().cpu()  # type: ignore[attr-defined]


@ray.remote(max_retries=3)
def _encode_shard(source: ImageSource, model: str, dtype: str, device: str, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pipe = load_pipeline(model, dtype, device)
    images, labels = source.read("train", records, native_resolution(pipe))
    out = []
    with torch.no_grad():
        for batch in np.array_split(images, max(1, -(-len(images) // 64))):
            x = torch.from_numpy(batch).to(device, getattr(torch, dtype)).permute(0, 3, 1, 2) / 127.5 - 1
            out.append(pipe.vae.encode(x).latent_dist.parameters.float().cpu().numpy())
    return np.concatenate(out), labels


def build_latent_cache(
    directory: Path, source: ImageSource, model: str, dtype: str, device: str, shard_size: int,
    resources: dict[str, float], on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encodes all training images, one Ray task per shard, into ``directory``.

    Args:
        shard_size: Records per task; the driver holds one shard at a time.
        resources: ``num_cpus`` / ``num_gpus`` of a task.
    """
    cache = LatentCache(str(directory))
    if cache.complete:
        return cache
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    pipe = load_pipeline(model, dtype)
    _save(directory / "embeddings.npy", encode_prompts(pipe, source.prompts).numpy())
    del pipe
    shards = np.array_split(np.arange(source.n_train), max(1, -(-source.n_train // shard_size)))
    # ImageSource may be large (a list of 300,000 paths): by reference, not pickled into every task
    source_ref = ray.put(source)
    pending = {
        _encode_shard.options(name="encode", **resources).remote(source_ref, model, dtype, device, shard): shard
        for shard in shards
    }
    moments: np.memmap | None = None
    labels = np.empty(source.n_train, np.int64)
    partial = directory / "moments.partial.npy"
    done = 0
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        shard = pending.pop(ready)
        values, shard_labels = cluster.result(ready)
        if moments is None:
            _touch_private(partial)
            moments = np.lib.format.open_memmap(partial, "w+", np.float32, (source.n_train, *values.shape[1:]))
        moments[shard], labels[shard] = values, shard_labels
        done += 1
        if on_progress:
            on_progress(done, len(shards))
    assert moments is not None
    moments.flush()
    del moments
    _save(directory / "labels.npy", labels)
    os.replace(partial, directory / "moments.npy")
    return cache


def _touch_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    _touch_private(partial)
    with open(partial, "wb") as f:
        np.save(f, array)
    os.replace(partial, path)
