"""Private selection of weight matrices: Ray tasks score shards, one noise draw, keep the top ratio.

Order of things: shards return clipped partial sums (no noise, never leave the cluster) -> the
driver adds them -> the event is written to the ledger -> noise is drawn once -> matrices are
ranked. An iterative score goes through that several times, each time without the matrices left out
so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, SaliencyConfig
from sapf_ray.grad_sample.capture import Pool
from sapf_ray.latents import LatentCache
from sapf_ray.models.conditioning import denoiser_of, to_denoiser
from sapf_ray.models.denoising import draw, per_record_loss, training_scheduler
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, plan_events
from sapf_ray.privacy.sampling import poisson_sample
from sapf_ray.runs import worktime
from sapf_ray.saliency.mechanisms import MECHANISMS, random_values
from sapf_ray.saliency.scores import (
    SCORES,
    Release,
    clipped_contribution,
    n_selected,
    schedule,
    top_n,
)
from sapf_ray.saliency.synflow import synflow_scores


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What selection releases; all of it is covered by the ledger's selection events.

    Attributes:
        matrices: Kept names in the pool's order.
        scores: Noisy score of every matrix in the pool (of the last round); empty where nothing was
            scored, or where the mechanism releases the choice alone.
        score: Name of the score, or ``all`` where the ratio keeps the whole pool.
        event: The (last) privacy event as JSON; None where selection reads no data.
        passed: Outcome of propose-test-release's test; where False the matrices are a random
            choice.
        shared: Whether other runs use the same releases (:mod:`sapf_ray.saliency.shared`).
    """

    matrices: list[str]
    scores: dict[str, float]
    score: str
    pool_size: int
    event: dict | None
    passed: bool | None = None
    shared: bool = False

    @classmethod
    def none(cls) -> Selection:
        """Of a run that trains nothing."""
        return cls(matrices=[], scores={}, score="none", pool_size=0, event=None)

    @property
    def stream(self) -> str | None:
        """Fingerprint under which the ledger has the releases; None where nothing was released."""
        return None if self.event is None else self.event["noise_id"]

    def to_dict(self) -> dict:
        return asdict(self)


def release_names(count: int) -> list[str]:
    """What a ledger calls the releases of a selection."""
    return ["selection"] if count == 1 else [f"selection/{number}" for number in range(count)]


def score_records(
    pipe: Any,
    cache: LatentCache,
    *,
    records: np.ndarray,
    key: NoiseKey,
    config: SaliencyConfig,
    number: int = 0,
    closed: Collection[str] = (),
) -> Release:
    """Clipped sum over ``records``: the exact value before noise. One forward and backward per
    micro-batch.

    Args:
        number: Of the release; each has its own diffusion noise.
        closed: Matrices that count as zero.
    """
    score, order = SCORES[config.score], MECHANISMS[config.mechanism].order
    denoiser = denoiser_of(pipe)
    pool = candidate_pool(denoiser, config.pool)
    scheduler = training_scheduler(pipe)
    total = score.zero(pool)
    for start in range(0, len(records), config.micro_batch_size):
        batch = records[start : start + config.micro_batch_size]
        moments, conditions = cache.read(batch)
        draws = draw(
            key,
            "selection/loss",
            number,
            batch,
            1,
            cache.latent_shape,
            scheduler.config.num_train_timesteps,
        )
        with score.capture(pool, closed) as capture:
            loss = per_record_loss(
                denoiser,
                scheduler,
                moments=moments,
                scaling_factor=pipe.vae.config.scaling_factor,
                conditions=to_denoiser(conditions, denoiser.device, dtype=denoiser.dtype),
                draws=draws,
            )
            loss.sum().backward()
            for running, part in zip(
                total, clipped_contribution(score, capture, config=config, order=order), strict=True
            ):
                running += part
    return total


@ray.remote(max_retries=3)
@worktime.timed
def _score_shard(
    model: ModelConfig,
    cache: LatentCache,
    records: np.ndarray,
    key: NoiseKey,
    config: SaliencyConfig,
    number: int,
    closed: Collection[str],
) -> Release:
    torch.set_num_threads(max(1, int(config.cpus_per_task)))
    pipe = kept_pipeline(model, pick_device(config.gpus_per_task))
    return score_records(
        pipe, cache, records=records, key=key, config=config, number=number, closed=closed
    )


@ray.remote(max_retries=3)
@worktime.timed
def _synflow(model: ModelConfig, config: SaliencyConfig, n: int) -> torch.Tensor:
    """The one score that needs weights and no data; (K,) on the CPU."""
    torch.set_num_threads(max(1, int(config.cpus_per_task)))
    denoiser = denoiser_of(kept_pipeline(model, pick_device(config.gpus_per_task)))
    pool = candidate_pool(denoiser, config.pool)
    return synflow_scores(denoiser, pool, n=n, rounds=config.rounds)


def select(
    model: PublicModel,
    cache: LatentCache,
    plan: PrivacyPlan,
    config: SaliencyConfig,
    key: NoiseKey,
    stream: str,
    ledger: Ledger,
    on_progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Selection:
    """Scores the pool under DP and keeps the top ratio.

    Args:
        plan: Its ``selection`` stage fixes noise, sample rate and number of releases; None means
            that no record is
            read: the whole pool is kept, or a part of it that random numbers or the weights alone
                choose.
        seed: Public; of the random choice.
        stream: Fingerprint of (noise key, plan, data): makes a repeated release recognisable.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    pool = model.pool(config.pool)
    names, n = list(pool), n_selected(len(pool), config.ratio)
    if plan.selection is None:
        if config.ratio == 1:
            return Selection(
                matrices=names, scores={}, score="all", pool_size=len(pool), event=None
            )
        if config.score == "synflow":
            task = _synflow.options(
                name="synflow",
                num_cpus=config.cpus_per_task,
                num_gpus=config.gpus_per_task,
            )
            values = cluster.result(task.remote(model.config, config, n))
            scores = dict(zip(names, values.tolist(), strict=True))
            return Selection(
                matrices=top_n(names, values, n=n, granularity=config.granularity),
                scores=scores,
                score=config.score,
                pool_size=len(pool),
                event=None,
            )
        return Selection(
            matrices=top_n(
                names, random_values(len(pool), seed), n=n, granularity=config.granularity
            ),
            scores={},
            score=config.score,
            pool_size=len(pool),
            event=None,
        )
    (event,) = [event for stage, event, _ in plan_events(plan) if stage == "selection"]
    kept, releases = names, plan.selection.count
    for number, size in enumerate(schedule(len(pool), n, releases)):
        closed = sorted(set(names) - set(kept))
        total = _exact_sum(
            model.config,
            cache,
            plan=plan,
            config=config,
            key=key,
            pool=pool,
            number=number,
            closed=closed,
            on_progress=on_progress,
        )
        recorded = ledger.record(release_names(releases)[number], event, stream, "selection")
        choice = MECHANISMS[config.mechanism].choose(
            total,
            SCORES[config.score],
            plan.selection,
            config.clipping_norm,
            size,
            key.stream("selection/noise", number),
            seed,
        )
        kept = top_n(names, choice.values, n=size, granularity=config.granularity)
    scores = (
        dict(zip(names, (choice.values / plan.n_records).tolist(), strict=True))
        if choice.released
        else {}
    )
    return Selection(
        matrices=kept,
        scores=scores,
        score=config.score,
        pool_size=len(pool),
        event=recorded,
        passed=choice.passed,
    )


def _exact_sum(
    model: ModelConfig,
    cache: LatentCache,
    *,
    plan: PrivacyPlan,
    config: SaliencyConfig,
    key: NoiseKey,
    pool: Pool,
    number: int,
    closed: list[str],
    on_progress: Callable[[int, int], None] | None,
    task: Any = _score_shard,
) -> Release:
    """The sum over all sampled records of release ``number``, before noise, from Ray tasks.

    Args:
        task: What scores a shard; the benchmark of scheduling has one without work.
    """
    assert plan.selection is not None
    records = poisson_sample(
        plan.n_records, plan.selection.sample_rate, generator=key.stream("selection/sample", number)
    )
    shards = [records[i : i + config.shard_size] for i in range(0, len(records), config.shard_size)]
    task = task.options(
        name="score",
        num_cpus=config.cpus_per_task,
        num_gpus=config.gpus_per_task,
        scheduling_strategy=cluster.SPREAD,
    )
    total, releases = SCORES[config.score].zero(pool), plan.selection.count
    parts = cluster.as_finished(
        lambda shard: task.remote(model, cache, shard, key, config, number, closed),
        shards,
        window=cluster.in_flight(config.cpus_per_task, config.gpus_per_task),
        ordered=True,  # the float sum, and so the release, repeats exactly
    )
    for added, (_, part) in enumerate(parts, 1):
        for running, one in zip(total, part, strict=True):
            running += one
        if on_progress:
            on_progress(number * len(shards) + added, releases * len(shards))
    return total
