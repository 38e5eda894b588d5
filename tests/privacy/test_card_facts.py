"""One object of facts: text and JSON of the card cannot disagree."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import pytest

from sapf_ray.config import RunConfig, TuningConfig, from_dict
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.card import card_json, privacy_card
from sapf_ray.privacy.card_facts import CardFacts, Unprotected
from sapf_ray.privacy.card_gather import gather
from sapf_ray.privacy.card_guarantee import warnings
from sapf_ray.privacy.card_label import label
from sapf_ray.privacy.group_privacy import group_epsilon
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan, plan_events

from .test_planner import DIGITS, small


@functools.cache
def facts_of(config: RunConfig) -> CardFacts:
    """Of a run of the digits that released all that was planned."""
    plan = make_plan(config, DIGITS)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.create(Path(folder) / "ledger.jsonl", plan)
        for stage, event, count in plan_events(plan):
            for i in range(count):
                ledger.record(f"{stage}/{i}", event, "s", stage)
        return gather(plan, ledger, config, model_name="tiny", data_name="digits")


def evolving() -> RunConfig:
    evolution = {"enabled": True, "iterations": 3, "embedding": "glyph"}
    return from_dict({"finetune": {"steps": 0}, "evolution": evolution})


UNPROTECTED = Unprotected(
    evaluation=True, scores=("accuracy",), diagnostics=(), skipped={"train": 3}
)
CHOICE = {"private": True, "distribution": "poisson", "mean_trials": 5.0}

CASES = {
    "private": small(steps=2),
    "not private": small(steps=2, non_private=True),
    "seeded": small(steps=2, reproducible_seed=1),
    "public model alone": small(steps=0),
    "evolution": evolving(),
    "private choice": dataclasses.replace(small(steps=2), tuning=TuningConfig(**CHOICE)),
}


@pytest.mark.parametrize("config", CASES.values(), ids=list(CASES))
def test_the_text_is_made_from_the_json_alone(config):
    facts = dataclasses.replace(
        facts_of(config),
        unprotected=UNPROTECTED,
        grounding={"prompts": {"grade_a": "An image of one"}},
    )
    data = json.loads(card_json(facts))
    assert CardFacts.from_dict(data) == facts
    assert privacy_card(CardFacts.from_dict(data)) == privacy_card(facts)
    assert "Infinity" not in card_json(facts) and "NaN" not in card_json(facts)
    assert data["warnings"] == list(warnings(facts)) and data["label"] == label(facts)
    assert len(data["label"]) == 9


def test_every_fact_that_is_a_number_changes_the_text():
    """So none is known to machines alone."""
    facts = facts_of(small(steps=2))
    data = facts.to_dict()
    text = privacy_card(facts)
    silent = []

    def walk(value, path):
        if isinstance(value, dict):
            for key in value:
                walk(value[key], (*path, key))
        elif isinstance(value, list):
            for i, part in enumerate(value):
                walk(part, (*path, i))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            changed = json.loads(json.dumps(data))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value / 2 if isinstance(value, float) else value + 1
            if privacy_card(CardFacts.from_dict(changed)) == text:
                silent.append(".".join(map(str, path)))

    walk({key: value for key, value in data.items() if key != "schema"}, ())
    # the grid's slack is told where there is any; deltas of other accountants are the run's
    known = {"stages.0.slack", "stages.1.slack", "budget.others.0.delta"}
    assert set(silent) <= known


def test_damaged_json_is_answered_by_naming_the_field():
    data = facts_of(small(steps=2)).to_dict()
    with pytest.raises(ValueError, match="schema 2: this version reads 1"):
        CardFacts.from_dict({**data, "schema": 2})
    with pytest.raises(ValueError, match=r"privacy card: budget\.planned"):
        CardFacts.from_dict({**data, "budget": {**data["budget"], "planned": "much"}})
    with pytest.raises(ValueError, match="privacy card: claim"):
        CardFacts.from_dict({key: value for key, value in data.items() if key != "claim"})


def test_numbers_are_those_of_the_ledger():
    config = small(steps=2)
    plan = make_plan(config, DIGITS)
    facts = facts_of(config)
    charges = [(event, count) for _, event, count in plan_events(plan)]
    strict = facts.budget.strict
    assert strict.delta == pytest.approx(1 / DIGITS**2)
    assert strict.epsilon == pytest.approx(
        compose_epsilon(charges, 1 / DIGITS**2, accountant=plan.accountant)
    )
    assert strict.epsilon > facts.spent
    two = group_epsilon(charges, 2, delta=plan.delta, interval=0.01)
    assert two * (1 - 1e-6) <= facts.persons[0].epsilon <= two * 1.02
    assert [person.images for person in facts.persons] == [2, 5, 10]
    finetune = facts.stages[-1]
    assert (finetune.noise_multiplier, finetune.count) == (plan.finetune.noise_multiplier, 2)


def test_what_was_charged_twice_counts_twice_for_a_person_too(tmp_path):
    config = small(steps=2)
    plan = make_plan(config, DIGITS)
    twice = dataclasses.replace(plan, epsilon=100.0)
    ledger = Ledger.create(tmp_path / "twice.jsonl", twice)
    for copy in "ab":
        for stage, event, count in plan_events(plan):
            for i in range(count):
                ledger.record(f"{stage}/{i}", event, copy, stage)
    given = {"model_name": "tiny", "data_name": "digits"}
    more = gather(twice, ledger, config, **given)
    once = facts_of(config)
    assert more.spent > once.spent and more.meaning.mu > once.meaning.mu
    assert all(a.epsilon > b.epsilon for a, b in zip(more.persons, once.persons, strict=True))


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (1.0, ["δ is above 1/N²", "Images are not people"]),
        (20.0, ["Large ε", "δ is above 1/N²", "Images are not people"]),
    ],
)
def test_hazards_are_warned_of(epsilon, expected):
    config = small(steps=2)
    privacy = dataclasses.replace(config.privacy, epsilon=epsilon)
    facts = facts_of(dataclasses.replace(config, privacy=privacy))
    found = [warning.split("**")[1].rstrip(".") for warning in warnings(facts)]
    assert found == expected
    text = privacy_card(facts)
    assert text.index("## Warnings") < text.index("## Numbers")


def test_a_guarantee_for_groups_has_no_warning_of_images():
    config = small(steps=2)
    data = dataclasses.replace(config.data, groups="column:patient")
    facts = facts_of(dataclasses.replace(config, data=data))
    assert facts.persons == () and "Images are not people" not in privacy_card(facts)


def test_no_guarantee_no_meaning():
    facts = facts_of(small(steps=2, non_private=True))
    assert facts.meaning is None and facts.persons == () and warnings(facts) == ()
    assert math.isinf(facts.spent) and facts.budget.strict.epsilon == math.inf
