"""One verdict for a run: what may be released, what may be tagged, what may be published."""

from __future__ import annotations

import dataclasses

import pytest

from sapf_ray.config import ClusterConfig, EvolutionConfig, FinetuneConfig, PrivacyConfig, RunConfig
from sapf_ray.errors import BudgetError
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.verdict import TAG, Kind, check_release, foreseen, judge, unverifiable
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import CARD, write_manifest, write_shard

N = 1297


def plan_of(*, steps: int = 2, **privacy):
    config = RunConfig(
        finetune=FinetuneConfig(steps=steps, batch_size=64),
        privacy=PrivacyConfig(accountant="rdp", **privacy),
        evolution=EvolutionConfig(),
    )
    return make_plan(config, N)


def verdict_of(tmp_path, plan, *, reproducible=False):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    return judge(plan, ledger, reproducible=reproducible)


@pytest.mark.parametrize(
    ("settings", "reproducible", "kind"),
    [
        ({}, False, Kind.PRIVATE),
        ({"steps": 0}, False, Kind.PUBLIC),
        ({"steps": 0, "non_private": True}, False, Kind.PUBLIC),
        ({"non_private": True}, False, Kind.NON_PRIVATE),
        ({"non_private": True}, True, Kind.NON_PRIVATE),
        ({}, True, Kind.SEEDED),
        ({"delta": 2 / N, "allow_large_delta": True}, False, Kind.LARGE_DELTA),
    ],
)
def test_what_a_run_is(tmp_path, settings, reproducible, kind):
    verdict = verdict_of(tmp_path, plan_of(**settings), reproducible=reproducible)
    assert verdict.kind is kind
    assert verdict.release == (kind in (Kind.PRIVATE, Kind.PUBLIC))
    assert verdict.answer == ("yes" if verdict.release else f"no: {kind}")
    assert (TAG in verdict.note.tags) == (kind is Kind.PRIVATE)
    assert ("Differentially private" in verdict.markdown) == (kind is Kind.PRIVATE)


def test_an_audit_is_none(tmp_path):
    plan = dataclasses.replace(plan_of(), canaries=100)
    assert verdict_of(tmp_path, plan).kind is Kind.AUDITED


def test_more_than_planned_is_none(tmp_path):
    plan = plan_of()
    ledger = Ledger.create(tmp_path / "ledger.jsonl", dataclasses.replace(plan, epsilon=1e6))
    for number in range(3):
        ledger.record(f"x/{number}", gaussian_event(0.2), f"id-{number}", "finetune")
    spent = ledger.epsilon_spent()
    assert spent > plan.epsilon
    over = dataclasses.replace(ledger.plan, epsilon=plan.epsilon)
    assert judge(over, ledger, reproducible=False).kind is Kind.UNVERIFIABLE, "another plan"
    ledger._header = dataclasses.replace(ledger.header, plan=over)
    assert judge(over, ledger, reproducible=False).kind is Kind.OVER_BUDGET


def test_only_what_is_private_is_published_unasked():
    never = [
        foreseen(plan_of(non_private=True), reproducible=False),
        foreseen(plan_of(), reproducible=True),
        unverifiable("A line of the ledger is missing."),
    ]
    storage = ClusterConfig(storage="s3://bucket/runs")
    for verdict in never:
        with pytest.raises(
            BudgetError, match=r"cluster.storage = 's3://.*not for release.*--not_p"
        ):
            check_release(verdict, storage)
        check_release(verdict, dataclasses.replace(storage, publish_not_private=True))
    check_release(foreseen(plan_of(), reproducible=False), storage)


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_data_set_is_tagged_only_if_it_is(tmp_path, reproducible):
    import numpy as np

    plan = SamplingPlan(n_images=2, n_classes=1, shard_size=2, seed=0)
    (shard,) = plan.shards
    images = np.zeros((2, 4, 4, 3), np.uint8)
    names = {"class_names": ("a",), "prompts": ("an a",), "spec": "spec"}
    write_shard(tmp_path, plan, shard=shard, images=images, **names)
    verdict = verdict_of(tmp_path, plan_of(), reproducible=reproducible)
    write_manifest(tmp_path, plan, privacy_note=verdict.note, **names)
    front = (tmp_path / CARD).read_text().split("---")[1]
    assert ("differential-privacy" in front) != reproducible and "- synthetic" in front
