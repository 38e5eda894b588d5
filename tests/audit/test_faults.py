"""Every planted fault is caught by the audit that docs/audit.md names, and no honest run is."""

from __future__ import annotations

import pytest

from jobs.audit_faults import FAULTS, POOL, claim_of, digits_plan
from sapf_ray.audit.scores import score
from sapf_ray.audit.synthetic_run import release_all
from sapf_ray.audit.white_box import parts, plan_attacks
from sapf_ray.privacy.keyed_rng import NoiseKey

CAUGHT_BY = {
    "honest": set(),
    "no noise": {"noise of the releases"},
    "noise 10x too small": {"noise of the releases"},
    "noise 3x too small": {"noise of the releases"},
    "noise of 4 ranks, each 1/4": {"noise of the releases"},
    "clipping off": {"contribution of a canary"},
    "shuffled epochs for Poisson": {"Poisson sampling"},
    "selection not paid": {"releases without a ledger line"},
    "float32 sums": set(),  # by the audit of sums: tests/audit/test_mechanisms.py
}


@pytest.fixture(scope="module")
def plan():
    return digits_plan(8.0)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_caught_by_the_test_of_their_part_and_by_no_other(plan, fault):
    with FAULTS[fault]():
        run = release_all(plan, 1000, key=NoiseKey.create(1), sizes={"selection": POOL})
    claim = claim_of(plan, [line.release for line in run.lines])
    found = parts(run.observed, run.coins, claim=claim)
    assert {finding.audit for finding in found if finding.falsified} == CAUGHT_BY[fault]


@pytest.mark.long
def test_gross_faults_are_caught_by_the_bound_on_epsilon(plan):
    canaries = 5000
    honest = release_all(plan, canaries, key=NoiseKey.create(0), sizes={"selection": POOL})
    claim = claim_of(plan, [])
    attacks = plan_attacks(honest.observed, canaries, claim=claim, confidence=0.95)

    def caught(run) -> set[str]:
        found = attacks.findings(score(run.observed, run.coins), power=False)
        return {finding.audit for finding in found if finding.falsified}

    assert caught(honest) == set()
    for fault in ("no noise", "noise 10x too small", "noise 3x too small", "clipping off"):
        with FAULTS[fault]():
            run = release_all(plan, canaries, key=NoiseKey.create(1), sizes={"selection": POOL})
        assert caught(run) == {"one run, f-DP"}, fault
