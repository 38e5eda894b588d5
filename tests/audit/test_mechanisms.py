"""Mechanism-level audits: honest releases stay below their claim and near it, twins do not."""

from __future__ import annotations

import pytest

from jobs.audit_faults import clipping_off, float32_sum, less_noise, noise_per_rank
from sapf_ray.audit.mechanisms import MECHANISMS, audit_mechanism, audit_sums
from sapf_ray.privacy import noise
from sapf_ray.privacy.keyed_rng import NoiseKey

RUNS = 2000
KEY = NoiseKey.create(5)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_honest_releases_are_below_their_claim_and_not_far(name):
    found = audit_mechanism(name, runs=RUNS, confidence=0.99, key=KEY)
    assert not found.falsified
    assert found.ceiling > found.claim, "a broken one could be seen"
    assert found.shown > 0.25 * found.claim, "the pair is a bad case, not an easy one"


@pytest.mark.long
@pytest.mark.parametrize("name", ["gaussian", "vote", "histogram", "proportions", "head"])
def test_too_little_gaussian_noise_is_falsified(name):
    with less_noise(5)():
        assert audit_mechanism(name, runs=1000, confidence=0.95, key=KEY).falsified


@pytest.mark.parametrize("twin", [less_noise(3), noise_per_rank])
def test_half_and_a_third_of_the_noise_are_falsified_by_ten_thousand_runs(twin):
    with twin():
        assert audit_mechanism("gaussian", runs=10_000, confidence=0.95, key=KEY).falsified


def test_no_clipping_is_falsified():
    with clipping_off():
        assert audit_mechanism("gaussian", runs=1000, confidence=0.99, key=KEY).falsified


@pytest.mark.long
@pytest.mark.parametrize("name", ["exponential", "propose_test_release"])
def test_too_little_noise_of_an_order_or_a_test_is_falsified(name, monkeypatch):
    gumbel, laplace = noise.add_gumbel, noise.add_laplace
    monkeypatch.setattr(noise, "add_gumbel", lambda v, scale, s: gumbel(v, scale / 3, s))
    monkeypatch.setattr(noise, "add_laplace", lambda v, scale, s: laplace(v, scale / 3, s))
    assert audit_mechanism(name, runs=RUNS, confidence=0.99, key=KEY).falsified


def test_a_record_moves_an_exact_sum_by_at_most_c_and_a_float32_sum_by_more():
    exact = audit_sums()
    assert not exact.falsified and 0.5 < exact.shown <= 1
    single = audit_sums(float32_sum)
    assert single.falsified and single.shown > 2
