"""Which remedies are chosen, and what they cost, from public facts alone."""

from __future__ import annotations

import dataclasses

import pytest

from sapf_ray.config import FinetuneConfig, GroundingConfig, RunConfig, from_dict, nest
from sapf_ray.errors import ConfigError
from sapf_ray.grounding.price import delta_of_release, vote_noise
from sapf_ray.privacy.calibration import Budget
from sapf_ray.privacy.choice import choose
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.planner import PrivacyPlan, make_plan, plan_events
from sapf_ray.privacy.stage_plan import StagePlan

BUDGET = Budget(epsilon=10.0, delta=1e-4, accountant="rdp")


def config(**changes) -> RunConfig:
    small = {"privacy.accountant": "rdp", "finetune.steps": 10, "finetune.batch_size": 64}
    return from_dict(nest({**small, **changes}))


def facts(n: int = 1297, classes: int = 10, *, known: bool) -> Facts:
    return Facts(n_records=n, n_classes=classes, words_known=known)


@pytest.mark.parametrize(
    ("changes", "known", "votes"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"grounding.remedies": "none"}, False, False),
        ({"grounding.remedies": "vote"}, True, True),
        ({"grounding.remedies": "tokens"}, False, False),
        ({"finetune.steps": 0}, False, False),
        ({"finetune.steps": 0, "grounding.remedies": "vote"}, True, True),
    ],
)
def test_the_vote_is_chosen_where_words_are_unknown_or_it_is_named(changes, known, votes):
    found = choose(config(**changes), facts(known=known), budget=BUDGET)
    assert ("vote" in found) == votes


@pytest.mark.parametrize(
    ("changes", "n", "known", "heads"),
    [
        ({}, 1297, False, True),
        ({}, 1297, True, True),
        ({"grounding.remedies": "none"}, 1297, True, False),
        ({}, 50, False, False),  # too few records
        ({"privacy.epsilon": 0.2}, 1297, False, False),  # too noisy
        ({"model.path": "/models/sd"}, 1297, False, False),  # latents tell too little
        ({"model.path": "/models/sd", "grounding.features": "owner/clip"}, 1297, False, True),
    ],
)
def test_a_head_is_chosen_where_it_is_reliable(changes, n, known, heads):
    given = config(**changes)
    budget = Budget(epsilon=given.privacy.epsilon, delta=1e-4, accountant="rdp")
    assert ("head" in choose(given, facts(n, known=known), budget=budget)) == heads


def test_no_head_for_one_class_alone():
    assert choose(config(), facts(classes=1, known=True), budget=BUDGET) == ()


def test_auto_chooses_no_vote_without_a_candidate_for_each_class():
    assert "vote" not in choose(config(), facts(classes=63, known=False), budget=BUDGET)
    assert "vote" in choose(config(), facts(classes=62, known=False), budget=BUDGET)


def test_nothing_is_chosen_where_the_facts_are_not_known():
    assert make_plan(config(), 1297).remedies == ()
    named = make_plan(config(**{"grounding.remedies": "tokens, vote"}), 1297)
    assert named.remedies == ("vote", "tokens")


@pytest.mark.parametrize(("n", "epsilon"), [(8105, 10.0), (8105, 1.0), (1297, 10.0), (1297, 1.0)])
def test_a_vote_stands_its_noise_or_takes_a_twentieth(n, epsilon):
    budget = Budget(epsilon=epsilon, delta=1e-4, accountant="rdp")
    noise = vote_noise(facts(n, known=False), budget)
    assert noise >= 0.0699 * n / 10
    plain = make_plan(config(**{"privacy.epsilon": epsilon}), n)
    voted = make_plan(config(**{"privacy.epsilon": epsilon}), n, facts=facts(n, known=False))
    assert voted.vote.noise_multiplier == pytest.approx(
        vote_noise(
            facts(n, known=False), Budget(epsilon=epsilon, delta=voted.delta, accountant="rdp")
        )
    )
    assert voted.vote.share < 0.08
    ratio = voted.finetune.noise_multiplier / plain.finetune.noise_multiplier
    assert 1 <= ratio < 1.05
    assert voted.composed_epsilon <= epsilon


def test_the_plan_has_the_vote_first_and_reads_back():
    plan = make_plan(config(), 1297, facts=facts(known=False))
    assert [(stage, count) for stage, _, count in plan_events(plan)] == [
        ("vote", 1),
        ("head", 1),
        ("selection", 1),
        ("finetune", 10),
    ]
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    old = {key: value for key, value in plan.to_dict().items() if key not in ("vote", "head")}
    del old["remedies"]
    assert PrivacyPlan.from_dict(old).remedies == ()


def test_known_words_leave_the_plan_as_it_was():
    given = config(**{"grounding.remedies": "none"})
    assert make_plan(given, 1297, facts=facts(known=True)) == make_plan(given, 1297)


@pytest.mark.parametrize("value", ["votes", "vote,vote", "vote,auto", ""])
def test_other_names_are_refused(value):
    with pytest.raises(ConfigError, match=r"grounding\.remedies = .*must be auto, none"):
        config(**{"grounding.remedies": value})


def test_a_vote_that_costs_all_is_refused():
    given = config(**{"grounding.remedies": "vote", "grounding.vote_noise_multiplier": 0.01})
    with pytest.raises(ConfigError, match=r"grounding\.vote_noise_multiplier .* the vote alone"):
        make_plan(given, 1297)


@pytest.mark.parametrize(
    "epsilon,changes,classes,expected",
    [
        (10.0, {}, 10, True),
        (1.0, {}, 10, False),
        (1.0, {}, 63, True),  # more classes than prompts: no vote
        (10.0, {"adapter": "direct"}, 10, False),
    ],
)
def test_tokens_are_chosen_where_a_class_is_heard_or_no_vote_is_possible(
    epsilon, changes, classes, expected
):
    whole = RunConfig(finetune=FinetuneConfig(**changes))
    budget = dataclasses.replace(BUDGET, epsilon=epsilon)
    assert ("tokens" in choose(whole, facts(classes=classes, known=False), budget=budget)) == (
        expected
    )
    assert "tokens" not in choose(whole, facts(classes=classes, known=True), budget=budget)


@pytest.mark.parametrize("changes", [{"adapter": "direct"}, {"steps": 0}])
def test_tokens_without_factors_to_train_them_with_are_refused(changes):
    with pytest.raises(ConfigError, match=r"grounding\.remedies = 'vote,tokens': must not name"):
        RunConfig(
            finetune=FinetuneConfig(**changes), grounding=GroundingConfig(remedies="vote,tokens")
        )


def test_a_plan_for_a_given_number_of_records_is_for_that_number():
    planned = make_plan(config(), 8105, facts=facts(1297, known=False))
    assert planned == make_plan(config(), 8105, facts=facts(8105, known=False))


@pytest.mark.parametrize(("noise", "epsilon"), [(4.0, 1.0), (1.0, 5.0), (0.5, 10.0)])
def test_the_delta_of_a_release_is_the_accountants(noise, epsilon):
    budget = Budget(epsilon=epsilon, delta=delta_of_release(noise, epsilon), accountant="pld")
    release = StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=1, share=None)
    assert budget.spent(release.charges(noise)) == pytest.approx(epsilon, rel=1e-3)
    assert delta_of_release(1e-3, 10.0) == 1.0  # of which a discretised answer takes gigabytes
