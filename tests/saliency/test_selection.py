"""Selection through real Ray tasks: partial sums, one noise draw, the ledger first."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from sapf_ray.config import FinetuneConfig, ModelConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.errors import BudgetError
from sapf_ray.latents import LatentCache
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.saliency.scores import SCORES, Score
from sapf_ray.saliency.selection import Pass, score_records, select
from tests.tiny import save_latents

N = 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_pipeline) -> LatentCache:
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, N)


def setup(tmp_path, **saliency):
    saliency = {"shard_size": 15, "micro_batch_size": 7, **saliency}
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=8.0, accountant="rdp"),
        saliency=SaliencyConfig(**saliency),
        finetune=FinetuneConfig(steps=3, batch_size=8),
    )
    plan = make_plan(config, N)
    tmp_path.mkdir(exist_ok=True)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    return config.saliency, Releaser(key=NoiseKey.create(1), ledger=ledger, plan=plan)


def opened(tiny_pipeline) -> PublicModel:
    return PublicModel.open(ModelConfig(path=str(tiny_pipeline)))


def work_of(tiny_pipeline, cache, *, config, key) -> Pass:
    return Pass(model=ModelConfig(path=str(tiny_pipeline)), cache=cache, config=config, key=key)


DATA_SCORES = sorted(name for name in SCORES if SCORES[name].contribution)


@pytest.mark.parametrize("score", DATA_SCORES)
def test_shards_do_not_change_the_release(ray_cluster, tiny_pipeline, cache, tmp_path, score):
    """Not in the last bit: sums are exact and all micro-batches have one size."""
    results = []
    for i, shard_size in enumerate((15, 40)):
        config, releaser = setup(tmp_path / str(i), score=score, shard_size=shard_size)
        results.append(select(opened(tiny_pipeline), cache, config=config, releaser=releaser))
        iterative = SCORES[score].iterative
        names = [f"selection/{r}" for r in range(config.rounds)] if iterative else ["selection"]
        assert [(e.stage, e.release, e.replay) for e in releaser.ledger.events()] == [
            ("selection", name, False) for name in names
        ]
    assert results[0] == results[1]
    assert len(results[0].matrices) == math.ceil(0.3 * 24) and results[0].pool_size == 24
    assert set(results[0].noise_ids) == set(names)


@pytest.mark.parametrize("score", DATA_SCORES)
def test_the_sum_depends_on_the_records_alone(tiny_pipeline, cache, tmp_path, score):
    config, releaser = setup(tmp_path / "a", score=score)
    pipe = load_pipeline(str(tiny_pipeline))
    work = work_of(tiny_pipeline, cache, config=config, key=releaser.key)
    records = np.arange(N)
    whole = score_records(pipe, records, work)
    shuffled = np.random.default_rng(0).permutation(records)
    parts = score_records(pipe, shuffled[:11], work) + score_records(pipe, shuffled[11:], work)
    assert parts.digest() == whole.digest()


def test_noise_has_the_planned_scale_and_is_drawn_once(ray_cluster, tiny_pipeline, cache, tmp_path):
    """Difference to the exact sum, over releases with other keys: chi-square at the 1e-6 level."""
    pipe = load_pipeline(str(tiny_pipeline))
    differences = []
    for seed in range(6):
        config, releaser = setup(tmp_path / str(seed), noise_multiplier=20.0)
        releaser = dataclasses.replace(releaser, key=NoiseKey.create(seed))
        noisy = select(opened(tiny_pipeline), cache, config=config, releaser=releaser)
        work = work_of(tiny_pipeline, cache, config=config, key=releaser.key)
        (exact,) = score_records(pipe, np.arange(N), work).values()
        differences.append(torch.tensor(list(noisy.scores.values())) * N - exact)
    values = torch.stack(differences).flatten() / 20.0
    p = stats.chi2.cdf(float(values.square().sum()), values.numel())
    assert 5e-7 < p < 1 - 5e-7
    for wrong in (
        0.0,
        0.5,
        math.sqrt(3),
    ):  # noise missing, halved, one draw per shard: the same check says no
        p = stats.chi2.cdf(float((values * wrong).square().sum()), values.numel())
        assert not 5e-7 < p < 1 - 5e-7
    assert statistics.fmean(values.tolist()) == pytest.approx(0, abs=0.5)


def test_event_is_on_disk_before_noise_exists(
    ray_cluster, tiny_pipeline, cache, tmp_path, monkeypatch
):
    config, releaser = setup(tmp_path / "a")

    def crash(*arguments, **options):
        assert len(Ledger.open(tmp_path / "a" / "ledger.jsonl").events()) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("sapf_ray.privacy.release.noise.noisy_sum", crash)
    with pytest.raises(KeyboardInterrupt):
        select(opened(tiny_pipeline), cache, config=config, releaser=releaser)


def test_second_selection_with_other_noise_is_stopped_by_the_budget(
    ray_cluster, tiny_pipeline, cache, tmp_path
):
    """The plan spends nearly all on selection, so a second one with a new key cannot be paid."""
    config, releaser = setup(tmp_path / "a", noise_multiplier=0.5)
    model = opened(tiny_pipeline)
    first = select(model, cache, config=config, releaser=releaser)
    again = select(model, cache, config=config, releaser=releaser)
    assert first.scores == again.scores  # an exact replay is free
    assert again.event["replay"] and not first.event["replay"]
    other = dataclasses.replace(releaser, key=NoiseKey.create(2))
    with pytest.raises(BudgetError, match="was paid with another sum"):
        select(model, cache, config=config, releaser=other)


def test_ratio_one_reads_nothing_and_costs_nothing(ray_cluster, tiny_pipeline, tmp_path):
    config, releaser = setup(tmp_path / "a", ratio=1.0)
    unread = LatentCache(str(tmp_path / "does-not-exist"))
    selection = select(opened(tiny_pipeline), unread, config=config, releaser=releaser)
    assert selection.matrices == list(candidate_pool(load_pipeline(str(tiny_pipeline)).unet))
    assert releaser.ledger.events() == [] and releaser.plan.selection is None


def test_scores_without_data_are_rows_and_nothing_falls_through_to_chance(
    ray_cluster, tiny_pipeline, tmp_path, monkeypatch
):
    """A data-free score from outside chooses as it says; one that reads data is never replaced by a
    random choice."""
    unread = LatentCache(str(tmp_path / "does-not-exist"))
    model = opened(tiny_pipeline)
    count = Score(data_free=lambda public: torch.arange(len(public.pool)).float())
    monkeypatch.setitem(SCORES._rows, "last", count)
    config, releaser = setup(tmp_path / "a", score="last")
    assert releaser.plan.selection is None
    chosen = select(model, unread, config=config, releaser=releaser)
    assert chosen.matrices == list(model.pool("qkv"))[-8:]
    config, releaser = setup(tmp_path / "b", score="synflow")
    chosen = select(model, unread, config=config, releaser=releaser)
    assert len(chosen.scores) == 24 and max(chosen.scores.values()) > 0
    reading = dataclasses.replace(config, score="snip")
    with pytest.raises(ValueError, match="reads data, the plan has no release"):
        select(model, unread, config=reading, releaser=releaser)
    with pytest.raises(ValueError, match="either a contribution or data_free"):
        Score()
