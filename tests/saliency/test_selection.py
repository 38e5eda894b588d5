"""Selection through real Ray tasks: partial sums, one noise draw, the ledger first."""

from __future__ import annotations

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
from sapf_ray.saliency.scores import SCORES
from sapf_ray.saliency.selection import score_records, select
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
    return config.saliency, plan, Ledger.create(tmp_path / "ledger.jsonl", plan)


@pytest.mark.parametrize("score", sorted(SCORES))
def test_shards_do_not_change_the_release(ray_cluster, tiny_pipeline, cache, tmp_path, score):
    model, key = PublicModel.open(ModelConfig(path=str(tiny_pipeline))), NoiseKey.create(1)
    results = []
    for i, shard_size in enumerate((15, 40)):
        config, plan, ledger = setup(tmp_path / str(i), score=score, shard_size=shard_size)
        results.append(select(model, cache, plan, config, key, "s", ledger))
        names = (
            [f"selection/{r}" for r in range(config.rounds)]
            if SCORES[score].iterative
            else ["selection"]
        )
        assert [(e.stage, e.release, e.replay) for e in ledger.events()] == [
            ("selection", name, False) for name in names
        ]
    assert results[0].matrices == results[1].matrices
    assert len(results[0].matrices) == math.ceil(0.3 * 24) and results[0].pool_size == 24
    for name, value in results[0].scores.items():
        assert value == pytest.approx(results[1].scores[name], rel=1e-4, abs=1e-5)


def test_noise_has_the_planned_scale_and_is_drawn_once(ray_cluster, tiny_pipeline, cache, tmp_path):
    """Difference to the exact sum, over releases with different keys: chi-square at the 1e-6 level."""
    model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    config, plan, _ = setup(tmp_path / "plan", noise_multiplier=20.0)
    exact = None
    differences = []
    for seed in range(6):
        key = NoiseKey.create(seed)
        _, _, ledger = setup(tmp_path / str(seed), noise_multiplier=20.0)
        noisy = select(model, cache, plan, config, key, "s", ledger)
        exact = score_records(
            load_pipeline(model.path), cache, records=np.arange(N), key=key, config=config
        )[0]
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
    config, plan, ledger = setup(tmp_path / "a")

    def crash(*arguments, **options):
        assert len(Ledger.open(tmp_path / "a" / "ledger.jsonl").events()) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("sapf_ray.saliency.mechanisms.add_gaussian_noise", crash)
    with pytest.raises(KeyboardInterrupt):
        select(
            PublicModel.open(ModelConfig(path=str(tiny_pipeline))),
            cache,
            plan,
            config,
            NoiseKey.create(1),
            "s",
            ledger,
        )


def test_second_selection_with_other_noise_is_stopped_by_the_budget(
    ray_cluster, tiny_pipeline, cache, tmp_path
):
    """The plan spends all but a little on selection, so a second one with a new key cannot be paid."""
    model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    config, plan, ledger = setup(tmp_path / "a", noise_multiplier=0.5)
    first = select(model, cache, plan, config, NoiseKey.create(1), "one", ledger)
    again = select(model, cache, plan, config, NoiseKey.create(1), "one", ledger)
    assert first == again or first.scores == again.scores  # an exact replay is free
    with pytest.raises(BudgetError):
        select(model, cache, plan, config, NoiseKey.create(2), "two", ledger)


def test_ratio_one_reads_nothing_and_costs_nothing(ray_cluster, tiny_pipeline, tmp_path):
    config, plan, ledger = setup(tmp_path / "a", ratio=1.0)
    unread = LatentCache(str(tmp_path / "does-not-exist"))
    selection = select(
        PublicModel.open(ModelConfig(path=str(tiny_pipeline))),
        unread,
        plan,
        config,
        NoiseKey.create(1),
        "s",
        ledger,
    )
    assert selection.matrices == list(candidate_pool(load_pipeline(str(tiny_pipeline)).unet))
    assert ledger.events() == [] and plan.selection is None
