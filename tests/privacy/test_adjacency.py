"""What docs/privacy.md proves of neighbours: zero-out at a counted N, else add-or-remove."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.stats import chi2, norm

from sapf_ray.config import RunConfig
from sapf_ray.data.base import SKIPPED
from sapf_ray.evolution.histogram import count_votes
from sapf_ray.grounding.head import exact_sum
from sapf_ray.grounding.space import Whitening
from sapf_ray.grounding.vote import vote_table
from sapf_ray.models.class_head import Projection
from sapf_ray.privacy.accountants import compose_epsilon, make_accountant
from sapf_ray.privacy.adjacency import ADJACENCIES
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.privacy.release import Releaser

from .test_planner import small

N, CLASSES, DIMENSION = 40, 3, 4
VICTIM = 7


def nominal(config: RunConfig, n: int) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, n_records=n))


def public_part(config: RunConfig, n: int) -> str:
    """What anyone may read before the first release."""
    return str(make_plan(config, n).to_dict())


def test_neighbours_under_a_nominal_n_have_one_plan_and_under_a_counted_n_two():
    config = small(steps=2, batch_size=64)
    given = nominal(config, 1300)
    assert public_part(given, 1297) == public_part(given, 1296)
    counted = public_part(config, 1297), public_part(config, 1296)
    assert counted[0] != counted[1], "the twin: it is no add-or-remove guarantee"


@pytest.mark.parametrize("groups", [None, "column:patient"])
@pytest.mark.parametrize("n", [None, 1300])
def test_the_plan_names_the_relation(n, groups):
    config = small(steps=2, batch_size=64)
    data = dataclasses.replace(config.data, n_records=n, groups=groups)
    plan = make_plan(dataclasses.replace(config, data=data), 1297)
    assert plan.neighbours.unit == ("image" if groups is None else "group")
    assert plan.neighbours.verb == ("zero out" if n is None else "add/remove")
    assert plan.n_records == (n or 1297)
    assert plan.sample_rate == 64 / plan.n_records
    assert plan.delta == pytest.approx(1 / (plan.n_records * math.log(plan.n_records)))
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan


def test_plans_of_earlier_versions_are_read_and_unknown_relations_refused():
    data = make_plan(small(steps=2), 1297).to_dict()
    for name in ("add_or_remove_one", "add_or_remove_one_group"):
        assert PrivacyPlan.from_dict({**data, "adjacency": name}).neighbours is ADJACENCIES[name]
    with pytest.raises(ValueError, match="not a privacy plan: 'replace_one'"):
        PrivacyPlan.from_dict({**data, "adjacency": "replace_one"})


# Samples -----------------------------------------------------------------------------------------


def samples(n_units: int | None, *, steps: int, plan: PrivacyPlan) -> np.ndarray:
    """Which records were sampled, bool (steps, 2N)."""
    key = NoiseKey(bytes(range(32))).bind("run")
    releaser = Releaser(key=key, ledger=None, plan=plan, n_units=n_units)  # type: ignore[arg-type]
    taken = np.zeros((steps, 2 * N), dtype=bool)
    for step in range(steps):
        taken[step, releaser.sample(f"finetune/step/{step}", stage="finetune")] = True
    return taken


@pytest.mark.parametrize("there", [N - 1, N, N + 20])
def test_every_record_that_is_there_is_sampled_at_the_nominal_rate(there):
    plan = make_plan(nominal(small(steps=2, batch_size=8), N), there)
    steps = 3000
    taken = samples(there, steps=steps, plan=plan)
    assert not taken[:, there:].any()
    rate = 8 / N
    deviation = (taken[:, :there].sum(0) - steps * rate) ** 2 / (steps * rate * (1 - rate))
    assert chi2.ppf(1e-6, there) < deviation.sum() < chi2.ppf(1 - 1e-6, there)
    if there > N:
        by_plan = samples(None, steps=steps, plan=plan)  # the twin leaves the last ones out
        assert not by_plan[:, N:there].any()


# Sums --------------------------------------------------------------------------------------------


def records() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, DIMENSION)).astype(np.float32)
    return features, rng.integers(0, CLASSES, N)


def votes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    same = Whitening(np.eye(DIMENSION))
    return vote_table([(features, labels)], np.eye(DIMENSION), whiten=same, n_classes=CLASSES)


def histogram(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    candidates = np.random.default_rng(1).normal(size=(4 * CLASSES, DIMENSION)).astype(np.float32)
    return count_votes(candidates, CLASSES, embeddings=features, labels=labels)


def head(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    projection = Projection(
        centre=np.zeros(DIMENSION), directions=np.eye(DIMENSION), radius=2.0, kind="test"
    )
    total = exact_sum([(features, labels)], projection, n_classes=CLASSES)
    return np.concatenate([part.double().numpy().ravel() * total.step for part in total.units])


def gradients(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As in selection and fine-tuning: a record without an image has a gradient of no numbers."""
    rows = torch.from_numpy(features).clone()
    rows[torch.from_numpy(labels == SKIPPED)] = math.nan
    (total,) = Clip(bound=1.0, mode="automatic", gamma=0.01).sum([rows]).values()
    return total.numpy()


@pytest.mark.parametrize("sums", [votes, histogram, head, gradients])
def test_a_record_that_is_zeroed_out_takes_its_own_contribution_away_and_nothing_else(sums):
    features, labels = records()
    emptied = labels.copy()
    emptied[VICTIM] = SKIPPED
    without = np.delete(features, VICTIM, axis=0), np.delete(labels, VICTIM)
    alone = features[VICTIM : VICTIM + 1], labels[VICTIM : VICTIM + 1]
    there, zeroed = sums(features, labels), sums(features, emptied)
    assert np.array_equal(zeroed, sums(*without)), "the same sum as where it is removed"
    assert np.allclose(there - zeroed, sums(*alone), atol=1e-12)
    assert 0 < np.linalg.norm(there - zeroed) <= 1


# Prices ------------------------------------------------------------------------------------------


def zero_out_delta(epsilon: float, *, sigma: float, rate: float) -> float:
    """Hockey-stick divergence of the pair in docs/privacy.md, in the worse order, by its closed
    form: the likelihood ratio rises with x.
    """
    # present against empty: mixture over normal exceeds e^epsilon above x
    above = math.expm1(epsilon) / rate + 1
    x = sigma**2 * math.log(above) + 0.5
    present = (1 - rate) * norm.sf(x / sigma) + rate * norm.sf((x - 1) / sigma)
    deltas = [present - math.exp(epsilon) * norm.sf(x / sigma)]
    # empty against present: below x
    below = (math.exp(-epsilon) - (1 - rate)) / rate
    if below > 0:
        x = sigma**2 * math.log(below) + 0.5
        mixture = (1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma)
        deltas.append(norm.cdf(x / sigma) - math.exp(epsilon) * mixture)
    return max(deltas)


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.1), (1.5, 0.4), (3.0, 0.9)])
def test_one_release_costs_what_the_pair_of_zero_out_does(sigma, rate):
    accountant = make_accountant("pld")
    accountant.compose(gaussian_event(sigma, rate))
    for epsilon in (0.1, 0.5, 1.5):
        exact = zero_out_delta(epsilon, sigma=sigma, rate=rate)
        assert accountant.get_delta(epsilon) == pytest.approx(exact, rel=1e-3, abs=1e-10)


def test_dp_accounting_prices_its_own_zero_out_as_add_or_remove():
    charges = [(gaussian_event(25.0), 1), (gaussian_event(1.6, 0.4), 20)]
    zero_out = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for event, count in charges:
        zero_out.compose(event, count)
    ours = compose_epsilon(charges, 1e-5, accountant="pld")
    assert zero_out.get_epsilon(1e-5) == pytest.approx(ours, rel=1e-6)
