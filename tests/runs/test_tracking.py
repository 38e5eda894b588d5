"""What goes to MLflow about the budget of an evolution.

``test_pipeline`` does the same for fine-tuning.
"""

from __future__ import annotations

import pytest

from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.runs.tracking import Tracker
from tests.evolution.test_accounting import config_of


class Client:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, float, int]] = []

    def log_metric(self, run_id: str, key: str, value: float, step: int = 0) -> None:
        self.logged.append((key, value, step))


def test_noise_share_and_spend_of_an_evolution_are_logged(tmp_path):
    plan = make_plan(config_of(), 100)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    for i in range(plan.evolution.count):
        ledger.record(f"evolution/histogram/{i}", plan.evolution.event(), "s", "evolution")
    tracker = Tracker("sqlite:///unused", "run")
    tracker.client = client = Client()
    tracker.log_plan(plan)
    values = {key: value for key, value, _ in client.logged}
    assert values["privacy/evolution_noise_multiplier"] == plan.evolution.noise_multiplier
    assert values["privacy/evolution_share"] == 1
    assert not [key for key in values if "finetune" in key or "selection" in key]
    client.logged.clear()
    tracker.log_spend(ledger)
    assert [(key, step) for key, _, step in client.logged] == [
        ("privacy/epsilon_spent", i) for i in range(6)
    ]
    curve = [value for _, value, _ in client.logged]
    assert (
        curve[0] == 0
        and curve == sorted(curve)
        and curve[-1] == pytest.approx(plan.composed_epsilon)
    )
