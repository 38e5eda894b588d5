"""A private choice: its price against the paper's formulas, its number of trials, its plan.

References:
    1. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import chisquare, norm

from sapf_ray.audit.auditor import CanaryScoreAuditor
from sapf_ray.config import (
    AuditConfig,
    DataConfig,
    EvolutionConfig,
    FinetuneConfig,
    PrivacyConfig,
    RunConfig,
    SaliencyConfig,
    TuningConfig,
)
from sapf_ray.errors import BudgetError, ConfigError
from sapf_ray.privacy.accountants import RDP_ORDERS, compose_epsilon, supports
from sapf_ray.privacy.events import (
    approximate_event,
    describe_event,
    event_from_json,
    event_to_json,
    gaussian_event,
)
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan, plan_events
from sapf_ray.privacy.repeat import Repeat

DIGITS = 1297
GEOMETRIC = Repeat(distribution="negative_binomial", mean=10.0, shape=1.0)
CHOICES = [
    GEOMETRIC,
    Repeat(distribution="negative_binomial", mean=5.0, shape=0.0),
    Repeat(distribution="negative_binomial", mean=4.0, shape=0.5),
    Repeat(distribution="poisson", mean=6.0),
]


def settings(**tuning) -> RunConfig:
    return RunConfig(
        privacy=PrivacyConfig(epsilon=10.0, accountant="rdp"),
        saliency=SaliencyConfig(noise_multiplier=25.0),
        finetune=FinetuneConfig(steps=20, batch_size=64),
        tuning=TuningConfig(private=True, **tuning),
    )


def to_epsilon(rdp: np.ndarray, delta: float) -> float:
    """Canonne, Kamath, Steinke 2020, proposition 12; every order."""
    orders = np.array(RDP_ORDERS)
    bound = rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(np.min(bound))


def of_the_paper(choice: Repeat, noise: float, delta: float) -> float:
    """Epsilon of a repeated Gaussian release, written down from theorems 2 and 6."""
    orders = np.array(RDP_ORDERS)
    one = orders / (2 * noise**2)
    price = one + math.log(choice.mean) / (orders - 1)
    if choice.distribution == "poisson":
        for i, order in enumerate(orders):
            near = math.log1p(1 / (order - 1))
            # the least delta of one trial at that epsilon (same proposition), over all orders
            log_delta = (orders - 1) * (one - near + np.log1p(-1 / orders)) - np.log(orders)
            price[i] += choice.mean * math.exp(min(0.0, log_delta.min()))
        return to_epsilon(price, delta)
    eta = choice.shape
    gammas = np.exp(np.linspace(-9, -1e-9, 2_000_001))  # solved by hand: a fine table of means
    if eta == 0:
        means = (1 / gammas - 1) / np.log(1 / gammas)
    else:
        means = eta * (1 - gammas) / (gammas * (1 - gammas**eta))
    gamma = gammas[np.abs(means - choice.mean).argmin()]
    other = (1 - 1 / orders) * one + math.log(1 / gamma) / orders
    price += (1 + eta) * other.min()
    return to_epsilon(np.minimum.accumulate(price[::-1])[::-1], delta)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_the_price_is_that_of_the_papers_theorems(choice, noise):
    found = compose_epsilon(
        [(choice.event([(gaussian_event(noise), 1)]), 1)], 1e-5, accountant="rdp"
    )
    assert found == pytest.approx(of_the_paper(choice, noise, 1e-5), rel=1e-3)
    one = compose_epsilon(gaussian_event(noise), 1e-5, accountant="rdp")
    assert one < found, "the best of several tells more than one"


def probabilities(choice: Repeat, most: int) -> np.ndarray:
    """P[K = k] for k = 0 … most, from definition 1."""
    k = np.arange(most + 1)
    if choice.distribution == "poisson":
        return np.exp(k * math.log(choice.mean) - choice.mean - gammaln(k + 1))
    eta, gamma = choice.shape, choice._gamma()
    positive = k[1:]
    if eta == 0:
        log = positive * math.log(1 - gamma) - np.log(positive) - math.log(math.log(1 / gamma))
    else:
        log = positive * math.log(1 - gamma) - math.log(gamma**-eta - 1)
        log += gammaln(positive + eta) - gammaln(eta) - gammaln(positive + 1)
    return np.concatenate([[0.0], np.exp(log)])


def drawn(choice: Repeat, n: int) -> np.ndarray:
    uniform = NoiseKey(bytes(32)).stream("trials").uniform(n)
    return choice.draw(uniform.numpy())


def p_value(sample: np.ndarray, choice: Repeat) -> float:
    """Of a chi-square test, of numbers in cells that expect at least five."""
    expected = probabilities(choice, 400) * len(sample)
    observed = np.bincount(np.minimum(sample, 400), minlength=401)
    kept = expected >= 5
    rest = [observed[~kept].sum()], [len(sample) - expected[kept].sum()]
    return float(
        chisquare(
            np.concatenate([observed[kept], rest[0]]),
            np.concatenate([expected[kept], rest[1]]),
        ).pvalue
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_the_number_of_trials_has_the_papers_distribution(choice):
    sample = drawn(choice, 4000)
    expected = probabilities(choice, 5000)
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    assert (expected * np.arange(5001)).sum() == pytest.approx(choice.mean, rel=1e-4)
    assert p_value(sample, choice) > 1e-4
    twin = np.full(4000, round(choice.mean))  # a fixed number of trials
    assert p_value(twin, choice) < 1e-12
    other = dataclasses.replace(choice, mean=choice.mean * 1.2)  # a mean that is not the priced one
    assert p_value(drawn(other, 4000), choice) < 1e-4


def shown(choice: Repeat | None, *, fixed: int = 0, runs: int = 20_000) -> float:
    """Epsilon, at delta 1e-3, that an attacker shows who sees the best of the trials.

    Each trial is a Gaussian release of noise 1 of whether one record is there, and its own score:
    nothing tells more. The best of K is drawn as it is distributed.
    """
    key = NoiseKey(bytes(32))
    outcomes = []
    for there in (1.0, 0.0):
        stream = key.stream("attack", there)
        trials = np.full(runs, fixed)
        if choice is not None:
            trials = choice.draw(stream.uniform(runs).numpy())
        best = norm.ppf(stream.uniform(runs).numpy() ** (1 / np.maximum(trials, 1))) + there
        outcomes.append(np.where(trials > 0, best, -1e3))
    auditor = CanaryScoreAuditor(*outcomes)
    return auditor.epsilon_clopper_pearson(delta=1e-3, confidence=0.99)


@pytest.mark.parametrize(
    "choice", [GEOMETRIC, dataclasses.replace(GEOMETRIC, mean=1000.0), CHOICES[-1]]
)
def test_an_attack_on_the_best_trial_shows_no_more_than_is_claimed(choice):
    claim = choice.event([(gaussian_event(1.0), 1)])
    assert shown(choice) <= compose_epsilon([(claim, 1)], 1e-3, accountant="rdp")


def test_a_fixed_number_of_trials_charged_as_one_is_caught():
    once = compose_epsilon(gaussian_event(1.0), 1e-3, accountant="rdp")
    assert shown(None, fixed=1) <= once
    assert shown(None, fixed=10**6) > once


def test_a_mean_of_one_is_one_trial():
    assert set(drawn(dataclasses.replace(GEOMETRIC, mean=1.0), 50)) == {1}


def test_events_survive_json_and_are_hashable():
    for choice in CHOICES:
        event = choice.event([(gaussian_event(5.0), 1), (gaussian_event(2.0, 0.1), 30)])
        text = json.dumps(event_to_json(event), allow_nan=False)
        assert event_from_json(json.loads(text)) == event
        assert hash(event_from_json(json.loads(text))) == hash(event)
        assert f"mean {choice.mean:g}" in describe_event(event) and "30 x" in describe_event(event)
    with pytest.raises(ValueError, match="at least 1"):
        event_from_json({**json.loads(text), "mean": 0.5})


def test_the_order_of_charges_does_not_make_another_event():
    charges = [(gaussian_event(5.0), 1), (gaussian_event(2.0, 0.1), 30)]
    assert GEOMETRIC.event(charges) == GEOMETRIC.event(charges[::-1])


def test_only_renyi_prices_a_choice_and_nothing_that_may_reveal():
    assert not supports("pld", GEOMETRIC.event([(gaussian_event(5.0), 1)]))
    assert not supports("rdp", GEOMETRIC.event([(approximate_event(1.0, 1e-7), 1)]))


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(settings(), DIGITS)


def test_the_plan_spends_the_budget_over_all_trials(plan):
    assert plan.repeat == dataclasses.replace(GEOMETRIC, held_out=130)
    assert plan.n_records == DIGITS - 130
    assert plan.delta == pytest.approx(1 / (DIGITS * math.log(DIGITS))), "of all records"
    assert 0.99 * 10 < plan.composed_epsilon <= 10
    charges = [(event, count) for _, event, count in plan_events(plan)]
    whole = [(plan.repeat.event(charges), 1)]
    found = compose_epsilon(whole, plan.delta, accountant="rdp")
    assert found == pytest.approx(plan.composed_epsilon)
    once = make_plan(dataclasses.replace(settings(), tuning=TuningConfig()), DIGITS)
    assert plan.finetune.noise_multiplier > 1.2 * once.finetune.noise_multiplier
    score = compose_epsilon(plan.score.event(), plan.delta, accountant="rdp")
    assert 0.99 < score <= 1, "a tenth of the budget"


def test_the_plan_survives_json(plan):
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    once = make_plan(dataclasses.replace(settings(), tuning=TuningConfig()), DIGITS)
    assert "repeat" not in once.to_dict() and "score" not in once.to_dict()


def test_a_ledger_charges_all_trials_from_the_first_release_on(plan, tmp_path):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    assert ledger.epsilon_spent() == 0
    ledger.record("score", plan.score.event(), "id", "score")
    assert ledger.epsilon_spent() == pytest.approx(plan.composed_epsilon)
    with pytest.raises(BudgetError, match="would raise epsilon"):
        for i in range(40):
            ledger.record(f"score/{i}", plan.score.event(), "id", "score")
    assert GEOMETRIC.whole(Counter(), Counter([gaussian_event(1.0)])) == Counter()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (settings(held_out=0.001), "tuning.held_out"),
        (settings(score_share=0.9), "tuning.score_share"),
        (dataclasses.replace(settings(), privacy=PrivacyConfig()), "privacy.accountant"),
        (
            dataclasses.replace(
                settings(), privacy=PrivacyConfig(accountant="rdp", reproducible_seed=0)
            ),
            "privacy.reproducible_seed",
        ),
        (
            dataclasses.replace(
                settings(), privacy=PrivacyConfig(accountant="rdp", non_private=True)
            ),
            "privacy.non_private",
        ),
        (dataclasses.replace(settings(), finetune=FinetuneConfig(steps=0)), "finetune.steps"),
        (dataclasses.replace(settings(), audit=AuditConfig(canaries=10)), "audit.canaries"),
        (
            dataclasses.replace(
                settings(),
                finetune=FinetuneConfig(steps=0),
                evolution=EvolutionConfig(enabled=True),
            ),
            "evolution.enabled",
        ),
        (dataclasses.replace(settings(), data=DataConfig(groups="published")), "data.groups"),
    ],
)
def test_what_a_choice_cannot_be_made_of_is_one_line(config, field):
    with pytest.raises(ConfigError, match=field) as error:
        make_plan(config, DIGITS)
    assert "\n" not in str(error.value)


def test_less_than_one_trial_is_refused():
    with pytest.raises(ConfigError, match=r"tuning\.mean_trials = 0\.5: must be at least 1"):
        TuningConfig(mean_trials=0.5)
