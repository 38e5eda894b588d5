"""Fans the sampling plan out over Ray actors.

The shards not yet on disk form one queue; an idle actor takes the next. Actors write their shards
themselves, so the images never pass through the driver. The output directory must therefore be
visible to every node that runs an actor (any shared file system).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, SynthesisConfig
from sapf_ray.errors import ClusterError
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.runs import runlog, worktime
from sapf_ray.synthesis.labelling import Labelling
from sapf_ray.synthesis.recipe import Recipe, adopt
from sapf_ray.synthesis.sampling_plan import SamplingPlan, Shard
from sapf_ray.synthesis.writer import is_complete, noted, remove_foreign, write_manifest

if TYPE_CHECKING:
    from sapf_ray.synthesis.shard_maker import ShardMaker

WAIT_SECONDS = 2.0  # between two looks at what unfinished shards have
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
    """Makes one shard at a time; stateless between shards, so a restart loses nothing.

    diffusers is imported with the first shard: only here, for the driver has no use for it.
    """

    def __init__(self, job: SamplingJob) -> None:
        self.job = job
        self.maker: ShardMaker | None = None

    @worktime.timed
    def make_shard(self, shard: Shard) -> tuple[int, float]:
        """Samples and writes a shard; returns its number of images and the seconds it took."""
        start = time.monotonic()
        # made here rather than in __init__, so that a broken model comes back as its own error
        if self.maker is None:
            from sapf_ray.synthesis.shard_maker import ShardMaker

            self.maker = ShardMaker(self.job)
        self.maker.make(shard)
        return shard.rows, time.monotonic() - start


def synthesize(
    out_dir: Path | str,
    model: PublicModel,
    *,
    adapter_dir: Path | str | None,
    class_names: Sequence[str],
    prompts: Sequence[str],
    config: SynthesisConfig,
    seed: int,
    privacy_note: PrivacyNote,
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
        privacy_note: For the dataset card.
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

        shown = done  # a finished shard's note is gone a moment before its actor's answer is here

        def report_parts() -> None:
            nonlocal shown
            shown = max(shown, min(done + noted(out), plan.n_images))
            report(shown, plan.n_images)

        for rows, seconds in _run_queue(job, missing, count=count, on_wait=report_parts):
            done += rows
            busy += seconds
            report_parts()
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
    job: SamplingJob,
    shards: list[Shard],
    *,
    count: int,
    kind: type = SamplingActor,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, float]]:
    """Yields (images, seconds of work) of each shard as it is finished.

    Args:
        job: What the actors make.
        shards: What is missing, in order.
        count: Number of actors.
        kind: Class of the actors; the benchmark of scheduling has one without work.
        on_wait: Called every few seconds while no shard is finished.
    """
    config = job.config
    actor_class: Any = ray.remote(kind)
    actor_class = actor_class.options(
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus,
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
        finished_now, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
        if not finished_now:
            on_wait()
            continue
        (ready,) = finished_now
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
    room = cluster.room(config.cpus_per_actor, config.gpus)
    if room == 0:
        raise ClusterError(
            "no node of the Ray cluster has room for a sampling actor with "
            f"synthesis.cpus_per_actor = {config.cpus_per_actor} and synthesis.gpus = "
            f"{config.gpus}"
        )
    return config.num_actors or room
