"""The white-box audit on runs that go through the releaser, and on broken twins of these."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.audit.auditor import CanaryScoreAuditor
from sapf_ray.audit.scores import Observed, log_ratio, score, simulate
from sapf_ray.audit.synthetic_run import release_all
from sapf_ray.audit.white_box import Claim, white_box
from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import make_plan, plan_events
from sapf_ray.privacy.stage_plan import StagePlan

M = 5000


@pytest.fixture(scope="module")
def plan():
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=8.0), finetune=FinetuneConfig(steps=60, batch_size=400)
    )
    return make_plan(config, 1000)


def claim_of(plan, lines) -> Claim:
    return Claim(
        epsilon=plan.composed_epsilon,
        delta=plan.delta,
        charges=[(event, count) for _, event, count in plan_events(plan)],
        paid=[line.release for line in lines],
    )


def findings(plan, run):
    found = white_box(run.observed, run.coins, claim=claim_of(plan, run.lines), confidence=0.95)
    return {finding.audit: finding for finding in found}


def test_an_honest_run_is_near_its_claim_and_below(plan):
    run = release_all(plan, M, key=NoiseKey.create(3), sizes={"selection": 24})
    found = findings(plan, run)
    assert not any(finding.falsified for finding in found.values())
    claim = plan.composed_epsilon
    assert 0.75 * claim < found["Gaussian estimate"].shown < 1.1 * claim
    bound = found["one run, f-DP"]
    assert 0.35 * claim < bound.shown < claim < bound.ceiling
    assert bound.power[5] > claim, "a fifth of the noise would have been seen"
    assert found["one run, (ε, δ)"].shown < bound.shown
    assert [len(o.seen) for o in run.observed] == [24] + [M] * 60


def test_scores_ignore_which_records_were_sampled(plan):
    """Knowing the sample is more than the claim allows: such an attack would pass it."""
    run = release_all(plan, M, key=NoiseKey.create(4))
    other = [
        Observed(name=o.name, stage=o.stage, seen=o.seen, drawn=~o.drawn) for o in run.observed
    ]
    assert np.array_equal(score(run.observed, run.coins).scores, score(other, run.coins).scores)


def test_log_ratio_is_that_of_the_mixture():
    stage = StagePlan(noise_multiplier=0.7, sample_rate=0.3, count=1, share=None)
    x = np.linspace(-3, 4, 15)
    out = np.exp(-(x**2) / (2 * 0.49))
    both = 0.7 * out + 0.3 * np.exp(-((x - 1) ** 2) / (2 * 0.49))
    np.testing.assert_allclose(log_ratio(x, stage), np.log(both / out), rtol=1e-9)
    huge = log_ratio(np.array([1e4]), stage)
    assert np.isfinite(huge).all()


def test_simulation_agrees_with_releases(plan):
    run = release_all(plan, M, key=NoiseKey.create(5))
    real = score(run.observed, run.coins)
    made = simulate(run.observed, M, seed=9)
    for ours, theirs in ((real.of_in, made.of_in), (real.of_out, made.of_out)):
        assert abs(ours.mean() - theirs.mean()) < 6 * ours.std() * (2 / len(ours)) ** 0.5


def test_auditor_scores_of_chance_and_of_certainty():
    generator = np.random.default_rng(0)
    chance = CanaryScoreAuditor(generator.normal(size=500), generator.normal(size=500))
    assert chance.epsilon_one_run(delta=1e-5, confidence=0.99, share=1.0) == 0
    assert chance.gaussian(delta=1e-5, confidence=0.999).low < 0.5
    assert abs(chance.attack_auroc() - 0.5) < 0.1
    sure = CanaryScoreAuditor(np.ones(500), np.zeros(500))
    assert sure.epsilon_one_run(delta=1e-6, confidence=0.95, share=1.0) > 4.5
    assert sure.attack_auroc() == 1.0 and sure.tpr_at_given_fpr(0.01) == 1.0
    tied = CanaryScoreAuditor(np.zeros(500), np.zeros(500))
    assert abs(tied.guesses(1.0).right - 500) < 120, "ties are no knowledge"
    with pytest.raises(ValueError, match="finite"):
        CanaryScoreAuditor(np.array([np.nan]), np.zeros(1))


def test_clopper_pearson_of_scores_of_independent_runs():
    generator = np.random.default_rng(1)
    auditor = CanaryScoreAuditor(generator.normal(1.0, size=10_000), generator.normal(size=10_000))
    assert 1.5 < auditor.epsilon_clopper_pearson(delta=1e-3, confidence=0.95) < 3.0
