"""Private selection of weight matrices: Ray tasks score shards, one noise draw, keep the top ratio.

Order of things: shards return clipped partial sums (no noise, never leave the cluster) -> the driver adds
them -> the event is written to the ledger -> noise is drawn once -> matrices are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import ray
import torch
from diffusers import StableDiffusionPipeline

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, SaliencyConfig
from sapf_ray.data.latents import LatentCache
from sapf_ray.models.denoising import draw, per_record_loss, training_scheduler
from sapf_ray.models.loading import load_pipeline, pick_device
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.noise import add_gaussian_noise
from sapf_ray.privacy.planner import PrivacyPlan, plan_events
from sapf_ray.privacy.sampling import poisson_sample
from sapf_ray.privacy.streams import NoiseKey
from sapf_ray.saliency.engine import PoolCapture
from sapf_ray.saliency.scores import SCORES, Release, clipped_contribution, top_matrices


@dataclass(frozen=True)
class Selection:
    """What selection releases; all of it is covered by the ledger's selection event.

    Attributes:
        matrices: Kept names in the pool's order.
        scores: Noisy score of every matrix in the pool; empty where nothing was scored.
        score: Name of the score, or ``all`` where the ratio keeps the whole pool.
        event: The privacy event as JSON; None where selection reads no data.
    """

    matrices: list[str]
    scores: dict[str, float]
    score: str
    pool_size: int
    event: dict | None

    def to_dict(self) -> dict:
        return asdict(self)


@lru_cache(maxsize=1)
def _pipeline(model: str, dtype: str, device: str) -> StableDiffusionPipeline:
    return load_pipeline(model, dtype, device)  # kept by the worker process between shards


def score_records(
    pipe: StableDiffusionPipeline, cache: LatentCache, records: np.ndarray, key: NoiseKey, config: SaliencyConfig
) -> Release:
    """Clipped sum over ``records``: the exact value before noise. One forward and backward per micro-batch."""
    score = SCORES[config.score]
    pool = candidate_pool(pipe.unet, config.pool)
    scheduler = training_scheduler(pipe)
    total = score.zero(pool)
    for start in range(0, len(records), config.micro_batch_size):
        batch = records[start : start + config.micro_batch_size]
        moments, embeddings = cache.read(batch)
        draws = draw(key, "selection/loss", 0, batch, 1, cache.latent_shape, scheduler.config.num_train_timesteps)
        with PoolCapture(pool, keep=score.keep_gradients) as capture:
            loss = per_record_loss(
                pipe.unet, scheduler, moments, pipe.vae.config.scaling_factor,
                embeddings.to(pipe.device, pipe.unet.dtype), draws,
            )
            loss.sum().backward()
            for running, part in zip(total, clipped_contribution(score, capture, config), strict=True):
                running += part
    return total


@ray.remote(max_retries=3)
def _score_shard(model: ModelConfig, cache: LatentCache, records: np.ndarray, key: NoiseKey, config: SaliencyConfig) -> Release:
    torch.set_num_threads(max(1, int(config.cpus_per_task)))
    pipe = _pipeline(model.path, model.dtype, pick_device(config.gpus_per_task))
    return score_records(pipe, cache, records, key, config)


def select(
    model: ModelConfig, cache: LatentCache, plan: PrivacyPlan, config: SaliencyConfig, key: NoiseKey, stream: str,
    ledger: Ledger, on_progress: Callable[[int, int], None] | None = None, seed: int = 0,
) -> Selection:
    """Scores the pool under DP and keeps the top ratio.

    Args:
        plan: Its ``selection`` stage fixes noise and sample rate; None means that no record is read: the whole pool
            is kept, or a random part of it.
        seed: Public; of the random choice.
        stream: Fingerprint of (noise key, plan, data): makes a repeated release recognisable.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    pool = candidate_pool(load_pipeline(model.path, model.dtype).unet, config.pool)
    if plan.selection is None:
        if config.ratio == 1:
            return Selection(list(pool), {}, "all", len(pool), None)
        lots = torch.rand(len(pool), generator=torch.Generator().manual_seed(seed))
        return Selection(top_matrices(list(pool), lots, config.ratio), {}, config.score, len(pool), None)
    records = poisson_sample(plan.n_records, plan.selection.sample_rate, key.stream("selection/sample"))
    shards = [records[i : i + config.shard_size] for i in range(0, len(records), config.shard_size)]
    task = _score_shard.options(name="score", num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task)
    pending = [task.remote(model, cache, shard, key, config) for shard in shards]
    order = {ref: i for i, ref in enumerate(pending)}
    arrived: dict[int, Release] = {}
    total = SCORES[config.score].zero(pool)
    added = 0
    while pending:
        (ready,), pending = ray.wait(pending, num_returns=1)
        arrived[order[ready]] = cluster.result(ready)
        while added in arrived:  # in shard order: the float sum, and so the release, repeats exactly
            for running, part in zip(total, arrived.pop(added), strict=True):
                running += part
            added += 1
        if on_progress:
            on_progress(added, len(shards))
    (event,) = [event for stage, event, _ in plan_events(plan) if stage == "selection"]
    recorded = ledger.record("selection", event, stream, "selection")
    noisy = add_gaussian_noise(
        total, plan.selection.noise_multiplier, config.clipping_norm, key.stream("selection/noise"),
        non_private=plan.non_private,
    )
    scores = SCORES[config.score].rank(noisy) / plan.n_records
    names = list(pool)
    return Selection(
        top_matrices(names, scores, config.ratio), dict(zip(names, scores.tolist(), strict=True)), config.score,
        len(pool), recorded,
    )
