"""Class proportions: one noisy count a class, or for nothing beside a head."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from sapf_ray.config import from_dict, nest
from sapf_ray.errors import BudgetError, ConfigError, DataError
from sapf_ray.files import write_json
from sapf_ray.grounding.proportions import check_proportions, find_proportions, release_counts
from sapf_ray.grounding.released import in_proportions
from sapf_ray.privacy import noise as noise_module
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.planner import make_plan
from tests.mechanisms import check_drawn, half_the_noise, releaser_of, without_noise

CLASSES = 400


def check_noise(tmp_path) -> None:
    labels = np.random.default_rng(0).integers(0, CLASSES, 5000)
    noisy = release_counts(labels, CLASSES, releaser=releaser_of("proportions", tmp_path))
    check_drawn((noisy - np.bincount(labels, minlength=CLASSES)) / 4.0)


def test_noise_is_as_planned(tmp_path):
    check_noise(tmp_path)


@pytest.mark.parametrize("mechanism", [without_noise, half_the_noise])
def test_broken_twins_are_rejected(tmp_path, monkeypatch, mechanism):
    monkeypatch.setattr(noise_module, "noisy_sum", mechanism)
    with pytest.raises(AssertionError):
        check_noise(tmp_path)


def test_other_counts_are_paid_anew_and_skipped_records_do_not_count(tmp_path):
    releaser = releaser_of("proportions", tmp_path, noise=5.0, epsilon=0.9)
    labels = np.array([0, 1, 1, 2])
    first = release_counts(labels, 3, releaser=releaser)
    skipped = np.append(labels, -1)
    assert np.array_equal(release_counts(skipped, 3, releaser=releaser), first)
    assert [event.replay for event in releaser.ledger.events()] == [False, True]
    with pytest.raises(BudgetError):
        release_counts(labels[1:], 3, releaser=releaser)
    with pytest.raises(DataError):
        release_counts(np.array([3]), 3, releaser=releaser)


def config(**changes):
    settings = {
        "privacy.accountant": "rdp",
        "finetune.steps": 10,
        "finetune.batch_size": 64,
        "grounding.remedies": "proportions",
    }
    return from_dict(nest(settings | changes))


def test_the_plan_pays_once_and_nothing_beside_a_head():
    facts = Facts(n_records=1297, n_classes=10, words_known=True)
    alone = make_plan(config(), 1297, facts=facts)
    assert alone.proportions is not None and alone.proportions.count == 1
    assert alone.composed_epsilon <= 10
    plain = make_plan(config(**{"grounding.remedies": "none"}), 1297, facts=facts)
    assert alone.finetune.noise_multiplier > plain.finetune.noise_multiplier
    beside = make_plan(config(**{"grounding.remedies": "head,proportions"}), 1297, facts=facts)
    assert beside.remedies == ("head", "proportions") and beside.proportions is None
    given = config(**{"synthesis.class_proportions": [1, 2, 3]})
    with pytest.raises(ConfigError, match=r"class_proportions .* must be left out"):
        check_proportions(given, alone)


def test_images_are_made_in_them_unless_others_are_given(tmp_path):
    np.save(tmp_path / "labels.npy", np.repeat([0, 1], [5000, 1000]))
    moments = np.zeros((6000, 2, 1, 1), np.float32)
    moments[:2000] = np.nan  # could not be read: such a record counts for nothing
    np.save(tmp_path / "moments.npy", moments)
    releaser = releaser_of("proportions", tmp_path)
    run = SimpleNamespace(
        plan=dataclasses.replace(releaser.plan, n_records=4000),
        latents=tmp_path,
        source=SimpleNamespace(class_names=("a", "b"), n_train=4000),
        vote_parts=None,
        releaser=releaser,
        config=config(),
        directory=SimpleNamespace(
            grounding=tmp_path / "grounding.json",
            read_json=lambda path: {"proportions": found["proportions"]},
        ),
    )
    assert in_proportions(run).class_proportions == ()  # nothing is released yet
    found = find_proportions(run)
    assert found["proportions"] == pytest.approx([0.75, 0.25], abs=0.01)
    write_json(tmp_path / "grounding.json", found)
    assert in_proportions(run).class_proportions == tuple(found["proportions"])
    run.config = config(**{"synthesis.class_proportions": [1, 3]})
    assert in_proportions(run).class_proportions == (1, 3)
