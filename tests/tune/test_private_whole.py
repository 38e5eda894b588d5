"""A whole private choice on a tiny model: trials, scores, and what is left of them: nothing."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from sapf_ray.privacy.ledger import Ledger
from sapf_ray.tune import private
from sapf_ray.tune.private_plan import open_choice
from sapf_ray.verify.checks import holds, verify
from tests.tune.test_space import write

TIME_OF_DAY = rb"\d\d[-:]\d\d[-:]\d\d\.\d{3}|T\d\d:\d\d:\d\d"

pytestmark = pytest.mark.long


@pytest.fixture
def space(tmp_path, tiny_pipeline) -> str:
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("a", "b")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(60):
                pixels = noise.integers(0, 100, (8, 8, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return write(
        tmp_path,
        base={
            "data.source": "image_folder",
            "data.path": str(tmp_path / "images"),
            "model.path": str(tiny_pipeline),
            "finetune.steps": 2,
            "finetune.batch_size": 16,
            "finetune.micro_batch_size": 8,
            "synthesis.n_images": 16,
            "synthesis.steps": 2,
            "evaluation.epochs": 1,
            "tracking.enabled": False,
            "privacy.accountant": "rdp",
            "tuning.mean_trials": 2.0,
            "tuning.held_out": 0.2,
        },
        axes={"lr": {"slow": {"finetune.learning_rate": 1e-3}, "fast": {}}},
    )


def test_three_trials_leave_one_winner_and_nothing_else(ray_cluster, tmp_path, space, monkeypatch):
    choice = open_choice(space, str(tmp_path / "choice"), strict=True)
    drawn = private.draw_trials
    cells = [item.cell for item in choice.planned]
    names: list[str] = []

    def three(choice, key):
        assert all(trial.cell in cells for trial in drawn(choice, key))
        trials = [
            private.Trial(name=key.stream_id("trial", i), cell=choice.planned[i % 2].cell)
            for i in range(3)
        ]
        names.extend(trial.name for trial in trials)
        return trials

    monkeypatch.setattr(private, "draw_trials", three)
    said: list[str] = []
    places = private.run_choice(choice, say=said.append, retries=0)
    assert said == [private.WATCHED]

    out = tmp_path / "choice"
    assert sorted(path.name for path in out.iterdir()) == ["choice.json", "chosen"]
    found = json.loads((out / "choice.json").read_text())
    assert found["cell"] in ("slow", "fast") and found["epsilon"] == choice.plan.composed_epsilon
    chosen = places.chosen
    assert not chosen.private.exists() and not chosen.checkpoints.exists()
    metrics = json.loads(chosen.metrics.read_text())
    assert metrics["epsilon_spent"] == pytest.approx(choice.plan.composed_epsilon)
    assert metrics["release"] == "yes" and "accuracy" in metrics

    ledger = Ledger.open(chosen.ledger)
    assert [event.release for event in ledger.events()][-1] == "score"
    assert ledger.plan == choice.plan
    assert ledger.epsilon_spent() == pytest.approx(choice.plan.composed_epsilon)
    text = chosen.card.read_text()
    assert "score" in text and "mean 2" in text

    for path in out.rglob("*"):
        assert not re.search(TIME_OF_DAY, path.name.encode()), path
        if path.is_file():
            content = path.read_bytes()
            if path != chosen.log:  # of the conclusion, when all trials are over
                assert not re.search(TIME_OF_DAY, content), path
            assert not any(secret.encode() in content for secret in names), path
    findings = verify(chosen.root)
    assert holds(findings), findings
    assert private.result_lines(places)[0].startswith("chosen: ")
    again = private.run_choice(choice, say=said.append, retries=0)
    assert said == [private.WATCHED] and again == places, "nothing is drawn twice"
