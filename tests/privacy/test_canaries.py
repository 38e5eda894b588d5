"""Canaries in the releases: who joins, where, by how much, and that no one else does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from sapf_ray.evolution.histogram import release_histogram
from sapf_ray.grounding.proportions import release_counts
from sapf_ray.grounding.vote import release_table
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.verdict import Kind, foreseen
from tests.mechanisms import KEY, releaser_of

BOUND = 0.5
M = 4000


def canaries_of(folder, count: int = M, key: NoiseKey = KEY) -> Canaries:
    canaries = Canaries(count=count, n_records=100, key=key, folder=str(folder / "audit"))
    canaries.prepare()
    return canaries


def zeros(size: int) -> ExactSum:
    return ExactSum.zeros([(size // 2, 1), (size - size // 2,)], BOUND)


def test_half_of_them_are_in_and_each_adds_the_bound_on_a_coordinate_of_its_own(tmp_path):
    canaries = canaries_of(tmp_path)
    joined = canaries.join("r", zeros(2 * M), stage="head", rate=1.0)
    values = torch.cat([part.flatten() for part in joined.values()]).numpy()
    coins = canaries.coins()
    assert stats.binomtest(int(coins.sum()), M).pvalue > 1e-6
    places = canaries.coordinates("head", 2 * M)
    assert len(np.unique(places)) == M
    np.testing.assert_allclose(values[places], BOUND * coins, rtol=1e-5)
    assert (values <= BOUND).all(), "no canary passes the sensitivity"
    assert values.sum() == pytest.approx(BOUND * coins.sum(), rel=1e-5), "and no one else joins"
    assert not np.array_equal(places, canaries.coordinates("vote", 2 * M))


def test_a_small_release_holds_as_many_canaries_as_it_has_values(tmp_path):
    canaries = canaries_of(tmp_path)
    assert sorted(canaries.coordinates("selection", 60)) == list(range(60))
    joined = canaries.join("selection", zeros(60), stage="selection", rate=1.0)
    values = torch.cat([part.flatten() for part in joined.values()])
    assert values.max() <= BOUND


def test_they_are_poisson_sampled_by_the_samplers_own_stream(tmp_path):
    canaries = canaries_of(tmp_path)
    drawn = np.stack([canaries.sampled(f"finetune/step/{i}", 0.3) for i in range(40)])
    assert stats.binomtest(int(drawn.sum()), drawn.size, 0.3).pvalue > 1e-6
    counts = drawn.sum(0)  # over the steps: binomial, not constant as shuffling has it
    dispersion = ((counts - 12) ** 2 / (40 * 0.3 * 0.7)).sum()
    assert stats.chi2.ppf(1e-6, M) < dispersion < stats.chi2.ppf(1 - 1e-6, M)
    joined = canaries.join("finetune/step/3", zeros(2 * M), stage="finetune", rate=0.3)
    values = torch.cat([part.flatten() for part in joined.values()]).numpy()
    present = values[canaries.coordinates("finetune", 2 * M)] > 0
    assert np.array_equal(present, canaries.coins() & drawn[3])


def test_real_records_are_sampled_as_without_canaries(tmp_path):
    without = releaser_of("head", tmp_path)
    (tmp_path / "b").mkdir()
    beside = dataclasses.replace(
        releaser_of("head", tmp_path / "b"), canaries=canaries_of(tmp_path)
    )
    assert np.array_equal(without.sample("head", stage="head"), beside.sample("head", stage="head"))


def test_what_is_kept_is_noise_and_canaries_without_the_records_sum(tmp_path):
    canaries = canaries_of(tmp_path)
    releaser = dataclasses.replace(releaser_of("head", tmp_path, noise=0.2), canaries=canaries)
    total = ExactSum.of([torch.arange(2 * M, dtype=torch.int64) * 1000], BOUND)
    (noisy,) = releaser.gaussian("head", total, stage="head")
    observed = np.load(tmp_path / "audit" / "head.npy")
    assert observed["drawn"].all(), "a full pass holds everyone"
    kept = observed["seen"]
    coins = np.load(tmp_path / "audit" / "coins.npy")
    places = canaries.coordinates("head", 2 * M)
    np.testing.assert_allclose(
        kept, ((noisy - total.values()[0]).numpy() / BOUND)[places], rtol=1e-5, atol=1e-6
    )
    noise = (kept - coins) / 0.2
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert stats.kstest(kept / 0.2, "norm").pvalue < 1e-6, "the canaries themselves are seen"
    assert oct((tmp_path / "audit").stat().st_mode)[-3:] == "700"
    assert oct((tmp_path / "audit" / "head.npy").stat().st_mode)[-3:] == "600"


def test_the_ledger_pays_for_the_joined_sum(tmp_path):
    releaser = dataclasses.replace(releaser_of("head", tmp_path), canaries=canaries_of(tmp_path))
    releaser.gaussian("head", zeros(60), stage="head")
    joined = releaser.joined("head", zeros(60), stage="head")
    assert releaser.ledger.events()[0].noise_id == releaser.noise_id("head", joined)
    assert releaser.noise_id("head", joined) != releaser.noise_id("head", zeros(60))


def test_an_audited_run_is_never_called_private(tmp_path):
    plan = dataclasses.replace(releaser_of("head", tmp_path).plan, canaries=7)
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    assert "canaries" not in dataclasses.replace(plan, canaries=0).to_dict()
    verdict = foreseen(plan, reproducible=False)
    assert verdict is not None and verdict.kind is Kind.AUDITED and not verdict.release


@pytest.mark.parametrize(
    ("stage", "release", "file"),
    [
        ("evolution", lambda r: release_histogram(np.arange(40), 0, r), "evolution-histogram-0"),
        ("vote", lambda r: release_table(np.zeros((4, 10), np.int64), r), "vote"),
        ("proportions", lambda r: release_counts(np.arange(40), 40, releaser=r), "proportions"),
    ],
)
def test_every_release_of_values_has_canaries(tmp_path, stage, release, file):
    canaries = canaries_of(tmp_path, count=10)
    releaser = dataclasses.replace(releaser_of(stage, tmp_path, noise=0.01), canaries=canaries)
    release(releaser)
    observed = np.load(tmp_path / "audit" / f"{file}.npy")
    np.testing.assert_allclose(observed["seen"], canaries.coins(), atol=0.1)


@pytest.mark.parametrize(
    ("mechanism", "method"),
    [("exponential", "exponential"), ("propose_test_release", "propose_test")],
)
def test_canaries_join_utilities_whose_release_shows_no_values(tmp_path, mechanism, method):
    canaries = canaries_of(tmp_path, count=10)
    releaser = releaser_of("selection", tmp_path)
    plan = releaser.plan
    stage = dataclasses.replace(
        plan.selection, mechanism=mechanism, delta=1e-6, noise_multiplier=0.5
    )
    releaser = dataclasses.replace(
        releaser, plan=dataclasses.replace(plan, selection=stage), canaries=canaries
    )
    total = ExactSum.zeros([(10,)], BOUND)
    getattr(releaser, method)("selection", total, stage="selection", n=3)
    (event,) = releaser.ledger.events()
    joined = releaser.joined("selection", total, stage="selection")
    assert event.noise_id == releaser.noise_id("selection", joined)
    assert joined.values()[0].sum() == pytest.approx(BOUND * canaries.coins().sum(), rel=1e-4)
    assert not (tmp_path / "audit" / "selection.npy").exists()
