from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountant_table import ACCOUNTANTS, Accountant
from sapf_ray.privacy.accountants import ADJACENCY, compose_epsilon
from sapf_ray.privacy.calibration import decimal_index, decimal_value, smallest_noise
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan, make_plan, plan_events
from sapf_ray.report.tables import plan_table

CIFAR10, CELEBA, DIGITS = 45_000, 162_770, 1_297


def config(
    epsilon=10.0,
    accountant="pld",
    sigma_s=5.0,
    steps=1000,
    batch_size=4096,
    ratio=0.3,
    sample_rate=1.0,
    **privacy,
):
    return RunConfig(
        privacy=PrivacyConfig(epsilon=epsilon, accountant=accountant, **privacy),
        saliency=SaliencyConfig(noise_multiplier=sigma_s, ratio=ratio, sample_rate=sample_rate),
        finetune=FinetuneConfig(steps=steps, batch_size=batch_size),
    )


def small(**kwargs):
    return config(
        **{"accountant": "rdp", "sigma_s": 25.0, "steps": 150, "batch_size": 256, **kwargs}
    )


@pytest.mark.parametrize(
    "n_records,epsilon,accountant,expected",
    [
        (CIFAR10, 10.0, "rdp", 1.796),
        (CELEBA, 10.0, "rdp", 0.820),
        (CIFAR10, 1.0, "pld", 20.34),
        (CELEBA, 10.0, "pld", 0.789),
    ],
)
def test_reference_noise_multipliers(n_records, epsilon, accountant, expected):
    plan = make_plan(config(epsilon, accountant), n_records)
    assert plan.finetune.noise_multiplier == pytest.approx(expected, rel=0.01)
    assert plan.delta == pytest.approx(1 / (n_records * math.log(n_records)))
    assert plan.composed_epsilon <= epsilon
    assert sum(stage.share for stage in (plan.selection, plan.finetune)) == pytest.approx(1)


@settings(max_examples=4, deadline=None)
@given(
    epsilon=st.floats(0.5, 4), steps=st.integers(1, 300), accountant=st.sampled_from(["pld", "rdp"])
)
def test_noise_is_the_smallest_of_four_digits_that_fits(epsilon, steps, accountant):
    plan = make_plan(small(epsilon=epsilon, steps=steps, accountant=accountant), DIGITS)
    noise = plan.finetune.noise_multiplier
    assert float(f"{noise:.3e}") == noise
    assert (
        compose_epsilon(
            [(e, n) for _, e, n in plan_events(plan)], plan.delta, accountant=accountant
        )
        == plan.composed_epsilon
    )
    assert plan.composed_epsilon <= epsilon
    less = dataclasses.replace(plan.finetune, noise_multiplier=noise * (1 - 1.1e-3))
    events = [(plan.selection.event(), 1), (less.event(), steps)]
    assert compose_epsilon(events, plan.delta, accountant=accountant) > epsilon


def test_noise_falls_with_epsilon_and_rises_with_steps():
    noises = [
        make_plan(small(epsilon=e), DIGITS).finetune.noise_multiplier for e in (0.5, 1.0, 10.0)
    ]
    assert noises == sorted(noises, reverse=True)
    noises = [make_plan(small(steps=s), DIGITS).finetune.noise_multiplier for s in (1, 100)]
    assert noises == sorted(noises)


def test_grid_of_four_digits():
    for value, up in [
        (1.7962, 1.797),
        (0.82001, 0.8201),
        (20.34, 20.34),
        (9.9991, 10.0),
        (1234.5, 1235.0),
        (1.0, 1.0),
    ]:
        assert decimal_value(decimal_index(value)) == up
    assert decimal_value(decimal_index(9.999) + 1) == 10.0


def test_delta_given_by_the_user_is_kept():
    assert make_plan(small(delta=1e-5), DIGITS).delta == 1e-5


def test_a_delta_of_one_record_in_n_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.01: must be below 1 / N = 0\.0007"):
        make_plan(small(delta=0.01), DIGITS)
    assert make_plan(small(delta=0.01, allow_large_delta=True), DIGITS).delta == 0.01


def test_a_delta_below_what_accounting_resolves_is_named():
    with pytest.raises(ConfigError, match=r"privacy\.delta = 1e-15: is smaller than what PLD"):
        make_plan(small(delta=1e-15, accountant="pld"), DIGITS)


def test_batch_of_all_records_needs_no_sampling():
    plan = make_plan(small(batch_size=DIGITS), DIGITS)
    assert plan.sample_rate == 1 and "Poisson" not in repr(plan.finetune.event())


def test_subsampled_selection_is_cheaper():
    full, part = (make_plan(small(sigma_s=5.0, sample_rate=r), DIGITS) for r in (1.0, 0.3))
    assert part.selection.share < full.selection.share
    assert part.selection.sample_rate == 0.3 and "PoissonSampled" in repr(part.selection.event())


@pytest.mark.parametrize(
    "bad,field,words",
    [
        (
            {"batch_size": 1298},
            "finetune.batch_size",
            "at most the number of training records, 1297",
        ),
        (
            {"sigma_s": 1.0, "epsilon": 1.0},
            "saliency.noise_multiplier",
            "selection alone spends epsilon",
        ),
    ],
)
def test_plans_that_cannot_be_made(bad, field, words):
    with pytest.raises(ConfigError, match=words) as error:
        make_plan(small(**bad), DIGITS)
    assert error.value.field == field


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_overspent_selection_names_a_noise_that_works(accountant):
    with pytest.raises(ConfigError) as error:
        make_plan(small(sigma_s=1.0, epsilon=1.0, accountant=accountant), DIGITS)
    advice = float(str(error.value).split("from ")[1].split()[0])
    assert (
        make_plan(
            small(sigma_s=advice, epsilon=1.0, accountant=accountant), DIGITS
        ).composed_epsilon
        <= 1
    )


def test_epsilon_out_of_reach_at_any_noise():
    # the selection leaves a 1e-9 th of the budget: no finite noise is enough for the steps
    spent = compose_epsilon(make_plan(small(), DIGITS).selection.event(), 1e-5, accountant="rdp")
    with pytest.raises(ConfigError, match="any noise multiplier") as error:
        make_plan(small(epsilon=spent * (1 + 1e-9), delta=1e-5), DIGITS)
    assert error.value.field == "privacy.epsilon"


def test_too_few_records():
    with pytest.raises(ConfigError) as error:
        make_plan(small(batch_size=1), 2)
    assert error.value.field == "data.n_records"


def test_zero_steps_read_nothing():
    plan = make_plan(small(steps=0), DIGITS)
    assert (
        plan.selection is None
        and plan.finetune is None
        and plan.composed_epsilon == 0
        and not plan_events(plan)
    )


def test_keeping_every_matrix_needs_no_release():
    plan = make_plan(small(ratio=1.0), DIGITS)
    assert plan.selection is None and plan.finetune.share == 1
    assert (
        plan.finetune.noise_multiplier
        < make_plan(small(sigma_s=5.0), DIGITS).finetune.noise_multiplier
    )


def test_non_private_plan_is_valid_json_and_infinite():
    plan = make_plan(small(non_private=True), DIGITS)
    assert plan.finetune.noise_multiplier == plan.selection.noise_multiplier == 0
    assert plan.composed_epsilon == math.inf and plan.finetune.share is None
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["composed_epsilon"] == "inf"
    assert PrivacyPlan.from_dict(data) == plan


def test_dict_is_the_json_contract_and_round_trips():
    plan = make_plan(small(), DIGITS)
    data = json.loads(json.dumps(plan.to_dict()))
    assert {
        "epsilon",
        "delta",
        "accountant",
        "n_records",
        "sample_rate",
        "steps",
        "selection",
        "finetune",
        "composed_epsilon",
    } <= set(data)
    assert {"noise_multiplier", "sample_rate", "share"} <= set(data["selection"])
    assert {"noise_multiplier", "share"} <= set(data["finetune"])
    assert data["adjacency"] == "zero_out_one"
    assert PrivacyPlan.from_dict(data) == plan
    with pytest.raises(ValueError):
        PrivacyPlan.from_dict({"epsilon": 1})


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({}, "25"),
        ({"non_private": True}, "NOT PRIVATE"),
        ({"steps": 0}, "reads no sensitive image"),
        ({"ratio": 1.0}, "no release"),
    ],
)
def test_table(kwargs, words):
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(plan_table(make_plan(small(**kwargs), DIGITS)))
    assert words in console.export_text()


def test_equal_plans_come_from_the_cache():
    first = make_plan(small(), DIGITS)
    searches = smallest_noise.cache_info().misses
    assert make_plan(small(), DIGITS) == first
    assert smallest_noise.cache_info().misses == searches


def test_an_unknown_mechanism_is_no_gaussian():
    stage = StagePlan(
        noise_multiplier=1.0, sample_rate=1.0, count=1, share=None, mechanism="exponentail"
    )
    with pytest.raises(ValueError, match="must be one of gaussian, exponential"):
        stage.event()


def test_an_accountant_that_cannot_price_the_plan_is_refused_in_one_line(monkeypatch):
    from tests.privacy.test_card import KnowsNothing

    row = Accountant(title="Nothing", make=lambda interval: KnowsNothing(ADJACENCY))
    monkeypatch.setitem(ACCOUNTANTS._rows, "nothing", row)
    planned = small(accountant="nothing")
    with pytest.raises(ConfigError, match=r"cannot price Gaussian, noise 25; pld or rdp can") as e:
        make_plan(planned, DIGITS)
    assert e.value.field == "privacy.accountant" and "\n" not in str(e.value)
