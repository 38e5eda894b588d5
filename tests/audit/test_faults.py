"""Every planted fault is caught by the audit that docs/audit.md names, and no honest run is."""

from __future__ import annotations

import pytest

from jobs.audit_faults import FAULTS, POOL, claim_of, digits_plan
from sapf_ray.audit.scores import score
from sapf_ray.audit.synthetic_run import release_all
from sapf_ray.audit.white_box import parts, plan_attacks
from sapf_ray.privacy.keyed_rng import NoiseKey

M = 5000
CAUGHT_BY = {
    "honest": set(),
    "no noise": {"one run, f-DP", "noise of the releases"},
    "noise 10x too small": {"one run, f-DP", "noise of the releases"},
    "noise 3x too small": {"one run, f-DP", "noise of the releases"},
    "noise of 4 ranks, each 1/4": {"noise of the releases"},
    "clipping off": {"one run, f-DP", "contribution of a canary"},
    "shuffled epochs for Poisson": {"Poisson sampling"},
    "selection not paid": {"releases without a ledger line"},
    "float32 sums": set(),  # by the audit of sums: tests/audit/test_mechanisms.py
}


@pytest.fixture(scope="module")
def planned():
    plan = digits_plan(8.0)
    run = release_all(plan, M, key=NoiseKey.create(0), sizes={"selection": POOL})
    attacks = plan_attacks(run.observed, M, claim=claim_of(plan, []), confidence=0.95)
    return plan, attacks


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_caught_by_their_audit_and_by_no_unrelated_one(planned, fault):
    plan, attacks = planned
    with FAULTS[fault]():
        run = release_all(plan, M, key=NoiseKey.create(1), sizes={"selection": POOL})
    claim = claim_of(plan, [line.release for line in run.lines])
    found = [
        *attacks.findings(score(run.observed, run.coins), power=False),
        *parts(run.observed, run.coins, claim=claim),
    ]
    caught = {finding.audit for finding in found if finding.falsified}
    assert caught - {"one run, f-DP"} == CAUGHT_BY[fault] - {"one run, f-DP"}
    assert caught >= CAUGHT_BY[fault]
    if not CAUGHT_BY[fault]:
        assert not caught
