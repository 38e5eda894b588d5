"""The last generation as a synthetic data set, in the format of :mod:`sapf_ray.synthesis`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapf_ray.evolution.generation import Generation
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.runs import worktime
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import (
    MANIFEST,
    is_complete,
    remove_foreign,
    write_manifest,
    write_shard,
)


def is_written(
    out_dir: Path | str, n_images: int, *, n_classes: int, spec: str, seed: int, shard_size: int
) -> bool:
    """Whether :func:`write_data_set` finished there with these arguments, and all is still whole.

    Args:
        out_dir: Directory of the data set.
        n_images: Number of images.
        n_classes: Number of classes.
        spec: Hash of the configuration.
        seed: Seed of the images.
        shard_size: Images per Parquet file.
    """
    out = Path(out_dir)
    plan = SamplingPlan(n_images=n_images, n_classes=n_classes, shard_size=shard_size, seed=seed)
    if not (out / MANIFEST).exists():
        return False
    return all(is_complete(out, plan, shard=shard, spec=spec) for shard in plan.shards)


@worktime.working()
def write_data_set(
    final: Generation,
    out_dir: Path | str,
    *,
    class_names: Sequence[str],
    prompts: Sequence[str],
    spec: str,
    privacy_note: PrivacyNote,
    seed: int,
    shard_size: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes Parquet shards, manifest and dataset card; a shard of ``spec`` that is there and whole
    is kept.

    Args:
        final: From :func:`sapf_ray.evolution.evolve.evolve`; images uint8 (R, R, 3).
        spec: Hex digest over all that decides which images come out; a re-run with another spec
            starts afresh.
        privacy_note: For the dataset card.
        seed: Of the run. The column ``seed`` names the seed of the slot's first image, its
            ancestor's place in the data set; an evolved image is not made from it alone.
        shard_size: Images per Parquet shard.
        on_progress: Called with (images done, images in all).

    Returns:
        The manifest, as written.
    """
    out = Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = SamplingPlan(
        n_images=final.size, n_classes=final.n_classes, shard_size=shard_size, seed=seed
    )
    remove_foreign(out, plan, spec=spec)
    for shard in plan.shards:
        if not is_complete(out, plan, shard=shard, spec=spec):
            images = final.read(np.arange(shard.start, shard.stop))
            write_shard(
                out,
                plan,
                shard=shard,
                images=images,
                class_names=class_names,
                prompts=prompts,
                spec=spec,
            )
        if on_progress:
            on_progress(shard.stop, plan.n_images)
    return write_manifest(
        out, plan, class_names=class_names, prompts=prompts, spec=spec, privacy_note=privacy_note
    )
