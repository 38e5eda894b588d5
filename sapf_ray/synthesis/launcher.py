"""Fans the sampling plan out over Ray actors.

The shards not yet on disk form one queue; an idle actor takes the next. Actors write their shards
themselves, so the images never pass through the driver. The output directory must therefore be
visible to every node that runs an actor (any shared file system).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, SynthesisConfig
from sapf_ray.errors import ClusterError
from sapf_ray.finetune.adapter import load_adapter
from sapf_ray.models.class_tokens import with_class_tokens
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_model import PublicModel
from sapf_ray.runs import runlog, worktime
from sapf_ray.synthesis.labelling import Labelling
from sapf_ray.synthesis.recipe import Recipe, adopt
from sapf_ray.synthesis.sampler import sample_images
from sapf_ray.synthesis.sampling_plan import SamplingPlan, Shard
from sapf_ray.synthesis.writer import (
    Rows,
    encode_png,
    is_complete,
    remove_foreign,
    write_manifest,
    write_shard,
)

MAX_RESTARTS = 3  # of one actor, and retries of one shard, by Ray itself


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """All an actor needs to know; public values only."""

    out_dir: str
    model: ModelConfig
    adapter_dir: str | None
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    config: SynthesisConfig
    plan: SamplingPlan
    spec: str
    labelling: Labelling | None = None


class Synthesis(NamedTuple):
    """What :func:`synthesize` reports: the manifest as written, and the share of the actors' time
    without work.
    """

    manifest: dict[str, Any]
    idle_share: float | None  # None where nothing was left to make


class SamplingActor:
    """Holds one pipeline and makes one shard at a time; stateless between shards, so a restart
    loses nothing.
    """

    def __init__(self, job: SamplingJob) -> None:
        torch.set_num_threads(max(1, int(job.config.cpus_per_actor)))
        self.job = job
        self.pipe: Any = None
        self.encoder = ThreadPoolExecutor(1)

    @worktime.timed
    def make_shard(self, shard: Shard) -> tuple[int, float]:
        """Samples and writes a shard; returns its number of images and the seconds it took."""
        start = time.monotonic()
        # loaded here rather than in __init__, so that a broken model comes back as its own error
        if self.pipe is None:
            self._open()
        job = self.job
        if job.labelling is None:
            images = self._sample(job.plan.labels(shard), job.plan.seeds(shard)).files
            chosen = None
        else:
            images, chosen = self._choose(job.labelling, shard)
        write_shard(
            Path(job.out_dir),
            job.plan,
            shard=shard,
            images=images,
            class_names=job.class_names,
            prompts=job.prompts,
            spec=job.spec,
            chosen=chosen,
        )
        return shard.rows, time.monotonic() - start

    def _open(self) -> None:
        job = self.job
        self.pipe = _pipeline(job)
        public = encode_conditions(self.pipe, job.prompts, class_labels=job.model.class_labels)
        adapter = Path(job.adapter_dir) if job.adapter_dir else None
        self.conditions = with_class_tokens(self.pipe, public, adapter)
        self.null = null_condition(self.pipe)

    def _sample(self, labels: np.ndarray, seeds: np.ndarray) -> Sampled:
        """The images of labels int64 (n,) and seeds int64 (n,)."""
        job = self.job
        config = job.config
        encoded = []  # one batch becomes PNG files while the next is sampled
        seen = []
        for start in range(0, len(labels), config.batch_size):
            batch = slice(start, start + config.batch_size)
            images = sample_images(
                self.pipe,
                self.conditions[torch.from_numpy(labels[batch])],
                null=self.null,
                seeds=seeds[batch],
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                resolution=config.resolution,
            )
            encoded.append(self.encoder.submit(encode_png, images))
            if job.labelling is not None:
                seen.append(job.labelling.see(self.pipe, images))
        return Sampled([file for batch in encoded for file in batch.result()], seen)

    def _choose(self, labelling: Labelling, shard: Shard) -> tuple[list[bytes], Rows]:
        """Round after round of a shard's candidates, until its classes lack none; then the choice
        among them.
        """
        plan = self.job.plan
        labels = plan.candidate_labels(shard)
        seeds = plan.candidate_seeds(shard)
        made = np.empty(0, np.int64)
        files: list[bytes] = []
        seen: list[np.ndarray] = []
        for start in range(0, len(labels), shard.rows):
            wanted = np.arange(start, min(start + shard.rows, len(labels)))
            if start:
                lacking = labelling.lacking(np.concatenate(seen), made, plan=plan, shard=shard)
                wanted = wanted[np.isin(labels[wanted], lacking)]
            sampled = self._sample(labels[wanted], seeds[wanted])
            made = np.concatenate([made, wanted])
            files += sampled.files
            seen += sampled.features
        kept, chosen = labelling.choose(np.concatenate(seen), made, plan=plan, shard=shard)
        return [files[row] for row in kept], chosen


class Sampled(NamedTuple):
    """Images of an actor: PNG files, and blocks of their features where a head labels them."""

    files: list[bytes]
    features: list[np.ndarray]


def synthesize(
    out_dir: Path | str,
    model: PublicModel,
    *,
    adapter_dir: Path | str | None,
    class_names: Sequence[str],
    prompts: Sequence[str],
    config: SynthesisConfig,
    seed: int,
    privacy_note: str,
    donors: Iterable[Path] = (),
    labelling: Labelling | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Synthesis:
    """Makes the synthetic data set, or what is missing of it.

    Which images come out does not depend on the number of actors, nor on which actor makes which
    shard. A shard on disk that is whole and belongs to the same model, adapter, prompts, sampling
    options and seed is kept; any other is made again, or copied from a data set that differs from
    this one in the number of its images alone.

    Args:
        out_dir: Directory of the shards, manifest and dataset card.
        model: The public model.
        adapter_dir: Directory that ``load_lora_weights`` reads, or None for the public model as it
            is.
        class_names: One per class.
        prompts: One per class.
        config: Sampling options.
        seed: Seed of the data set.
        privacy_note: Markdown for the dataset card.
        donors: Directories of other data sets, to copy images from where they are the very same.
        labelling: How a private head labels images; by default labels are those of the prompts.
        on_progress: Called with (images done, images in all), first before any image is made.

    Raises:
        DataError: Model or adapter missing or damaged.
        ClusterError: No node can hold an actor, or actors keep dying; finished shards stay.
    """
    out = Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = SamplingPlan(
        n_images=config.n_images,
        n_classes=len(class_names),
        shard_size=config.shard_size,
        seed=seed,
        weights=config.class_proportions,
        oversample=1.0 if labelling is None else labelling.oversample,
    )
    adapter = str(Path(adapter_dir).resolve()) if adapter_dir is not None else None
    recipe = Recipe.of(
        model,
        adapter,
        class_names=class_names,
        prompts=prompts,
        config=config,
        seed=seed,
        labelling=labelling,
    )
    spec = recipe.spec(plan.n_images)
    job = SamplingJob(
        out_dir=str(out),
        model=model.config,
        adapter_dir=adapter,
        class_names=tuple(class_names),
        prompts=tuple(prompts),
        config=config,
        plan=plan,
        spec=spec,
        labelling=labelling,
    )

    remove_foreign(out, plan, spec=spec)
    missing = [shard for shard in plan.shards if not is_complete(out, plan, shard=shard, spec=spec)]
    if missing:
        missing = adopt(out, plan, missing=missing, donors=donors, recipe=recipe)
    done = plan.n_images - sum(shard.rows for shard in missing)
    report = on_progress or (lambda done, total: None)
    report(done, plan.n_images)
    idle = None
    if missing:
        if done:
            runlog.event("stage_resumed", images=done)
        count = min(_actor_count(config), len(missing))
        busy = 0.0
        start = time.monotonic()
        for rows, seconds in _run_queue(job, missing, count=count):
            done += rows
            busy += seconds
            report(done, plan.n_images)
        idle = max(0.0, 1 - busy / (count * (time.monotonic() - start)))
    with worktime.working():
        return Synthesis(
            write_manifest(
                out,
                plan,
                class_names=class_names,
                prompts=prompts,
                spec=spec,
                privacy_note=privacy_note,
                label_note=None if labelling is None else labelling.note,
            ),
            idle,
        )


def _run_queue(
    job: SamplingJob, shards: list[Shard], *, count: int, kind: type = SamplingActor
) -> Iterator[tuple[int, float]]:
    """Yields (images, seconds of work) of each shard as it is finished.

    Args:
        job: What the actors make.
        shards: What is missing, in order.
        count: Number of actors.
        kind: Class of the actors; the benchmark of scheduling has one without work.
    """
    config = job.config
    actor_class: Any = ray.remote(kind)
    actor_class = actor_class.options(
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        scheduling_strategy=cluster.SPREAD,
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
    )
    queue = iter(shards)
    running: dict[ray.ObjectRef, Any] = {}
    for _ in range(count):
        actor = actor_class.remote(job)
        running[actor.make_shard.remote(next(queue))] = actor
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor = running.pop(ready)
        finished = cluster.result(ready)
        shard = next(queue, None)
        if shard is not None:
            running[actor.make_shard.remote(shard)] = actor
        # an actor without work goes out of scope here and frees its cores for one still waiting to
        # start
        del actor
        yield finished


def _actor_count(config: SynthesisConfig) -> int:
    """Actors to start.

    Raises:
        ClusterError: No node of the cluster could hold one.
    """
    room = cluster.room(config.cpus_per_actor, config.gpus_per_actor)
    if room == 0:
        raise ClusterError(
            "no node of the Ray cluster has room for a sampling actor with "
            f"synthesis.cpus_per_actor = {config.cpus_per_actor} and synthesis.gpus_per_actor = "
            f"{config.gpus_per_actor}"
        )
    return config.num_actors or room


def _pipeline(job: SamplingJob) -> Any:
    """The public pipeline with the adapter merged into its weights."""
    pipe: Any = load_pipeline(
        job.model.path, job.model.dtype, device=pick_device(job.config.gpus_per_actor)
    )
    if job.adapter_dir is not None:
        load_adapter(pipe, Path(job.adapter_dir))
    for module in (denoiser_of(pipe), pipe.vae):
        module.to(
            memory_format=torch.channels_last
        )  # what convolutions want, on CPU and on tensor cores
    return pipe
