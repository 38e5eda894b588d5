"""What the chaos run checks, on ledgers and folders that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.chaos import last_release, released, unpaid_or_doubled
from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan, plan_events

STEPS = 3


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=8.0, accountant="rdp"),
        finetune=FinetuneConfig(steps=STEPS, batch_size=8),
    )
    return Ledger.create(tmp_path / "ledger.jsonl", make_plan(config, 100))


def pay(ledger: Ledger, steps: int, stream: str = "s") -> None:
    events = {stage: event for stage, event, _ in plan_events(ledger.plan)}
    ledger.record("selection", events["selection"], stream, "selection")
    for step in range(steps):
        ledger.record(f"finetune/step/{step}", events["finetune"], stream, "finetune")


def test_a_ledger_that_shows_each_release_once_is_right_and_replays_are_free(ledger, tmp_path):
    pay(ledger, STEPS)
    assert unpaid_or_doubled(tmp_path) == []
    pay(ledger, STEPS)  # the same streams: replays
    assert (
        unpaid_or_doubled(tmp_path) == [] and last_release(tmp_path) == f"finetune/step/{STEPS - 1}"
    )


def test_a_missing_step_and_a_release_charged_twice_are_found(ledger, tmp_path):
    assert last_release(tmp_path / "nowhere") == "nothing yet"
    pay(ledger, STEPS - 1)
    assert unpaid_or_doubled(tmp_path) == ["2 steps charged, 3 planned"]
    events = {stage: event for stage, event, _ in plan_events(ledger.plan)}
    ledger.record("finetune/step/0", events["finetune"], "another stream", "finetune")
    assert "finetune/step/0: charged 2 times" in unpaid_or_doubled(tmp_path)


def test_one_other_byte_in_what_is_released_is_another_outcome(tmp_path):
    def run(name: str, image: bytes) -> Path:
        for folder in ("adapter", "synthetic"):
            (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / "selection.json").write_text("{}")
        (tmp_path / name / "adapter" / "weights").write_bytes(b"w")
        (tmp_path / name / "synthetic" / "train-0.parquet").write_bytes(image)
        return tmp_path / name

    assert released(run("a", b"x")) == released(run("b", b"x")) != released(run("c", b"y"))
