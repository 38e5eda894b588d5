"""Private selection of weight matrices: Ray tasks score shards, one noise draw, keep the top ratio.

Order of things: shards return exact clipped partial sums (no noise, never leave the cluster) -> the
driver adds them -> the releaser pays the event, then draws noise once -> matrices are ranked. An
iterative score goes through that several times, each time without the matrices pruned so far. A
score that reads no data is computed once, by whoever has the weights if it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from sapf_ray import cluster
from sapf_ray.config import ModelConfig, SaliencyConfig
from sapf_ray.grad_sample.backprop_scale import backprop_scale
from sapf_ray.grad_sample.capture import Pool, PoolCapture
from sapf_ray.latents import LatentCache
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.device import fix_rounding, pick_device
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import forward_process
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs import worktime
from sapf_ray.saliency.mechanisms import MECHANISMS, Choice, Question
from sapf_ray.saliency.scores import SCORES, Public, n_selected, schedule, top_n
from sapf_ray.unit_batch import UnitBatch


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What selection releases; all of it is covered by the ledger's selection events.

    Args:
        matrices: Kept names in the pool's order.
        scores: Noisy score of every matrix in the pool (of the last round); empty where nothing was
            scored, or where the mechanism releases the choice alone.
        score: Name of the score, ``all`` where the ratio keeps the whole pool, or ``none``.
        pool_size: Number of matrices in the pool, K.
        event: The (last) privacy event as JSON; None where selection reads no data.
        passed: Outcome of propose-test-release's test; where False the matrices are a random
            choice.
        shared: Whether other runs use the same releases (:mod:`sapf_ray.saliency.shared`).
        noise_ids: Name of each release to the ``noise_id`` under which the ledger has it.
    """

    matrices: list[str]
    scores: dict[str, float]
    score: str
    pool_size: int
    event: dict | None
    passed: bool | None = None
    shared: bool = False
    noise_ids: dict[str, str] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Selection:
        """The selection of a run that trains nothing."""
        return cls(matrices=[], scores={}, score="none", pool_size=0, event=None)

    def to_dict(self) -> dict:
        return asdict(self)


def release_names(count: int) -> list[str]:
    """What a ledger calls the releases of a selection."""
    return ["selection"] if count == 1 else [f"selection/{number}" for number in range(count)]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the records; small, so it travels to tasks as it is.

    Args:
        model: The public model.
        cache: The encoded records.
        config: The section ``saliency``.
        key: The run's bound key; diffusion draws come from it.
        number: Number of the release; each has its own diffusion draws.
        pruned: Names of matrices that count as zero.
    """

    model: ModelConfig
    cache: LatentCache
    config: SaliencyConfig
    key: NoiseKey
    number: int = 0
    pruned: Collection[str] = ()


def clip_of(config: SaliencyConfig) -> Clip:
    """How a record's contribution is bounded."""
    return Clip(
        bound=config.clipping_norm,
        mode=config.clipping,
        gamma=config.clipping_gamma,
        order=MECHANISMS[config.mechanism].order,
    )


def score_records(pipe: Any, records: np.ndarray, work: Pass) -> ExactSum:
    """The exact clipped sum over ``records``, before noise.

    One forward and backward pass per micro-batch. All micro-batches have the same number of rows,
    the last one is filled up with rows that get no gradient: kernels of another batch size may
    round a record's own gradient differently, and then the sum would depend on the shards.

    Args:
        pipe: The loaded pipeline.
        records: Indices of the records, or of the groups of the cache.
        work: What the pass is for.
    """
    config = work.config
    score = SCORES[config.score]
    assert score.contribution is not None
    denoiser = denoiser_of(pipe)
    pool = candidate_pool(denoiser, config.pool)
    process = forward_process(pipe)
    latent_scale = LatentScale.of(pipe.vae)
    scale = backprop_scale(denoiser.dtype, work.cache.latent_shape)
    total = ExactSum.zeros(score.shapes(pool), config.clipping_norm)
    for start in range(0, len(records), config.micro_batch_size):
        batch = records[start : start + config.micro_batch_size]
        real = len(batch)
        batch = np.pad(batch, (0, config.micro_batch_size - real), mode="edge")
        units = UnitBatch.read(
            work.cache,
            batch,
            key=work.key,
            purpose="selection/loss",
            step=work.number,
            k=config.draws_per_record,
            process=process,
        )
        capture = PoolCapture(
            pool,
            keep=score.keep_gradients,
            rows_per_record=config.draws_per_record,
            weighted=score.weighted,
            pruned=work.pruned,
            scale=scale,
        )
        with capture:
            loss = units.losses(
                denoiser,
                process,
                scale=latent_scale,
                conditions=units.conditions.to(denoiser.device, denoiser.dtype),
            )
            (loss[:real].sum() * scale).backward()
        total = total + score.contribution(capture, clip_of(config))
    return total


@ray.remote(max_retries=3)
@worktime.timed
def _score_shard(work: Pass, records: np.ndarray) -> ExactSum:
    torch.set_num_threads(max(1, int(work.config.cpus_per_task)))
    fix_rounding()
    pipe = kept_pipeline(work.model, pick_device(work.config.gpus))
    return score_records(pipe, records, work)


@ray.remote(max_retries=3)
@worktime.timed
def _score_weights(model: ModelConfig, config: SaliencyConfig, n: int, seed: int) -> Tensor:
    """(K,) values of a score that reads weights and no data, on the CPU."""
    torch.set_num_threads(max(1, int(config.cpus_per_task)))
    denoiser = denoiser_of(kept_pipeline(model, pick_device(config.gpus)))
    pool = candidate_pool(denoiser, config.pool)
    return _without_data(denoiser, pool, config=config, n=n, seed=seed).cpu()


def _without_data(
    denoiser: Any, pool: Pool, *, config: SaliencyConfig, n: int, seed: int
) -> Tensor:
    score = SCORES[config.score]
    assert score.data_free is not None
    public = Public(denoiser=denoiser, pool=pool, n=n, rounds=config.rounds, seed=seed)
    return score.data_free(public)


def select(
    model: PublicModel,
    cache: LatentCache,
    *,
    config: SaliencyConfig,
    releaser: Releaser,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Keeps the top ratio of the pool: scored under DP, or chosen without the data.

    Args:
        model: The public model.
        cache: The encoded records; read only where the plan has releases of a selection.
        config: The section ``saliency``.
        releaser: Pays and draws; its plan's ``selection`` fixes noise, sample rate and number of
            releases, and is None where no record is read.
        seed: Seed of a public random choice.
        on_progress: Called with (shards done, shards in all), over all releases; after whole
            releases alone where records are sampled, as their number is secret.

    Raises:
        BudgetError: A release would pass the planned epsilon; it has not been drawn.
    """
    if releaser.plan.selection is None:
        return _select_without_data(model, config, seed=seed)
    pool = model.pool(config.pool)
    names = list(pool)
    kept = names
    sizes = schedule(
        len(names), n_selected(len(names), config.ratio), releaser.plan.selection.count
    )
    choice: Choice | None = None
    noise_ids = {}
    for number, name in enumerate(release_names(len(sizes))):
        work = Pass(
            model=model.config,
            cache=cache,
            config=config,
            key=releaser.key,
            number=number,
            pruned=sorted(set(names) - set(kept)),
        )
        total = exact_sum(
            releaser.sample(name, stage="selection"),
            work,
            zero=ExactSum.zeros(SCORES[config.score].shapes(pool), config.clipping_norm),
            on_shard=_share_of(
                on_progress,
                number,
                releases=len(sizes),
                sampled=releaser.plan.selection.sample_rate < 1,
            ),
        )
        question = Question(
            name=name,
            total=total,
            n=sizes[number],
            score=SCORES[config.score],
            releaser=releaser,
            seed=seed,
        )
        choice = MECHANISMS[config.mechanism].choose(question)
        noise_ids[name] = releaser.noise_id(name, releaser.joined(name, total, stage="selection"))
        kept = top_n(names, choice.values, n=sizes[number], granularity=config.granularity)
    assert choice is not None
    scores = {}
    if choice.released:
        scores = dict(zip(names, (choice.values / releaser.plan.n_records).tolist(), strict=True))
    return Selection(
        matrices=kept,
        scores=scores,
        score=config.score,
        pool_size=len(names),
        event=releaser.ledger.events()[-1].to_dict(),
        passed=choice.passed,
        noise_ids=noise_ids,
    )


def _select_without_data(model: PublicModel, config: SaliencyConfig, *, seed: int) -> Selection:
    """The whole pool, or the part of it that weights or random numbers choose."""
    pool = model.pool(config.pool)
    names = list(pool)
    if config.ratio == 1:
        return Selection(matrices=names, scores={}, score="all", pool_size=len(names), event=None)
    score = SCORES[config.score]
    if score.data_free is None:
        raise ValueError(f"saliency.score = {config.score!r}: reads data, the plan has no release")
    n = n_selected(len(names), config.ratio)
    if score.reads_weights:
        task = _score_weights.options(
            name="score weights", num_cpus=config.cpus_per_task, num_gpus=config.gpus
        )
        values = cluster.result(task.remote(model.config, config, n, seed))
    else:
        values = _without_data(model.denoiser, pool, config=config, n=n, seed=seed)
    shown = dict(zip(names, values.tolist(), strict=True)) if score.reads_weights else {}
    return Selection(
        matrices=top_n(names, values, n=n, granularity=config.granularity),
        scores=shown,
        score=config.score,
        pool_size=len(names),
        event=None,
    )


def exact_sum(
    records: np.ndarray,
    work: Pass,
    *,
    zero: ExactSum,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
    task: Any = _score_shard,
) -> ExactSum:
    """The sum over the records, before noise, from one Ray task per shard.

    Integers are added as they come: the sum does not depend on shards or their order.

    Args:
        records: Indices of the sampled records.
        work: What the pass is for.
        zero: The sum over no record.
        on_shard: Called with (shards done, shards in all).
        task: What scores a shard; the benchmark of scheduling has one without work.
    """
    config = work.config
    shards = [records[i : i + config.shard_size] for i in range(0, len(records), config.shard_size)]
    task = task.options(
        name="score",
        num_cpus=config.cpus_per_task,
        num_gpus=config.gpus,
        scheduling_strategy=cluster.SPREAD,
    )
    shared = ray.put(work)
    parts = cluster.as_finished(
        lambda shard: task.remote(shared, shard),
        shards,
        window=cluster.in_flight(config.cpus_per_task, config.gpus),
    )
    total = zero
    for done, (_, part) in enumerate(parts, 1):
        total = total + part
        on_shard(done, len(shards))
    return total


def _share_of(
    on_progress: Callable[[int, int], None] | None, number: int, *, releases: int, sampled: bool
) -> Callable[[int, int], None]:
    """Progress of one of several releases, as progress of all."""

    def show(done: int, shards: int) -> None:
        if on_progress is None:
            return
        if not sampled:
            on_progress(number * shards + done, releases * shards)
        elif done == shards:
            on_progress(number + 1, releases)

    return show
