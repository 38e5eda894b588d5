"""A private choice: which trials are drawn, what stays secret, what is refused.

The runs are stand-ins here that leave a run directory; `test_private_whole.py` has real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import numpy as np
import pytest
from scipy.stats import chisquare

from sapf_ray import cluster
from sapf_ray.config import from_dict
from sapf_ray.errors import RunDirectoryError, SapfError
from sapf_ray.files import write_json
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.tune import private
from sapf_ray.tune.private_plan import open_choice, plan_lines
from sapf_ray.tune.trial import Failure
from tests.tune.test_commands import call
from tests.tune.test_space import write

SMALL = {
    "finetune.steps": 2,
    "finetune.batch_size": 64,
    "privacy.accountant": "rdp",
    "tuning.mean_trials": 4.0,
}
RATES = {"lr": {"slow": {"finetune.learning_rate": 1e-3}, "fast": {"finetune.learning_rate": 1e-1}}}


@pytest.fixture
def space(tmp_path) -> str:
    return write(tmp_path, base=SMALL, axes=RATES)


class Runs:
    """In the place of Ray's task: scores by learning rate, a break where one is wanted."""

    def __init__(self) -> None:
        self.started: list[tuple[str, bool]] = []  # name, whether tracked
        self.breaks_at: int | None = None
        self.failure: Failure | None = None

    def options(self, **options: object) -> Runs:
        return self

    def remote(self, config: dict, out: str) -> Failure | None:
        whole = from_dict(config)
        run = RunDirectory(out)
        assert whole.tuning.private and whole.tuning.split is not None
        self.started.append((run.name, whole.tracking.enabled))
        if self.breaks_at == len(self.started):
            raise SapfError("broke off")
        if self.failure is not None:
            return self.failure
        run.claim(whole)
        try:
            if run.metrics.exists():  # of the winner, once more
                assert not run.private.exists() and not whole.cluster.keep_cache
                return None
            assert whole.cluster.keep_cache and whole.cluster.selection_dir is None
            assert whole.cluster.storage is None and not whole.tracking.enabled
            run.prepare_private()
            correct = 100.0 if whole.finetune.learning_rate > 1e-3 else 50.0
            write_json(run.score, {"noisy_correct": correct + len(self.started) / 100})
            run.log.write_text("when it ran\n")
            write_json(run.metrics, {"release": "yes"})
            run.card.write_text("card")
            return None
        finally:
            run.release()


@pytest.fixture
def runs(monkeypatch) -> Runs:
    monkeypatch.setattr(cluster, "session", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "result", lambda outcome: outcome)
    return Runs()


def test_trials_draw_cells_uniformly_with_replacement_from_the_key(space):
    choice = open_choice(space)
    keys = [NoiseKey.create(seed) for seed in range(300)]
    drawn = [private.draw_trials(choice, key) for key in keys]
    assert drawn == [private.draw_trials(choice, key) for key in keys], "a choice is continued"
    numbers = np.array([len(trials) for trials in drawn])
    assert numbers.mean() == pytest.approx(4, abs=0.8) and numbers.min() >= 1
    cells = [trial.cell.name for trials in drawn for trial in trials]
    counts = [cells.count("slow"), cells.count("fast")]
    assert chisquare(counts).pvalue > 1e-4
    names = [trial.name for trials in drawn for trial in trials]
    assert len(set(names)) == len(names) and {len(name) for name in names} == {32}


def test_the_best_score_wins_and_all_else_is_deleted(tmp_path, space, runs):
    choice = open_choice(space, str(tmp_path / "choice"))
    before = time.time()
    said: list[str] = []
    places = private.run_choice(choice, say=said.append, task=runs)
    assert said == [private.WATCHED]
    out = tmp_path / "choice"
    assert sorted(path.name for path in out.iterdir()) == ["choice.json", "chosen"]
    *trials, (last, tracked) = runs.started
    assert last == "chosen" and tracked, "its place in MLflow, once it is over"
    assert not any(tracked for _, tracked in trials)
    found = json.loads(places.result.read_text())
    best = "fast" if found["noisy_accuracy"] * choice.repeat.held_out > 99 else "slow"
    assert found["cell"] == best and found["epsilon"] <= 10
    assert not places.chosen.log.exists()
    secret = [name for name, _ in trials]
    for path in out.rglob("*"):
        assert path.stat().st_mtime >= before
        assert not path.is_file() or not any(s in path.read_text() for s in secret)
    n = len(runs.started)
    private.run_choice(choice, say=said.append, task=runs)
    assert len(runs.started) == n + 1 and said == [private.WATCHED], "nothing is drawn again"


def test_a_broken_choice_is_continued_as_it_was_drawn(tmp_path, space, runs, monkeypatch):
    choice = open_choice(space, str(tmp_path / "choice"))
    key = NoiseKey.create(0)
    while len(private.draw_trials(choice, key)) < 4:
        key = NoiseKey.create()
    monkeypatch.setattr(NoiseKey, "create", lambda seed=None: key)
    runs.breaks_at = 3
    with pytest.raises(SapfError, match="a trial broke off") as error:
        private.run_choice(choice, say=print, retries=0, task=runs)
    assert runs.started[-1][0] not in str(error.value), "no trial is named"
    held_out = private.Places(out=tmp_path / "choice").split.read_bytes()
    changed = open_choice(space, str(tmp_path / "choice"), overrides={"tuning.mean_trials": 5.0})
    with pytest.raises(RunDirectoryError, match="begun with other cells or settings"):
        private.run_choice(changed, say=print, task=runs)
    runs.breaks_at = None
    assert private.Places(out=tmp_path / "choice").split.read_bytes() == held_out
    private.run_choice(choice, say=print, retries=0, task=runs)
    expected = [trial.name for trial in private.draw_trials(choice, key)]
    names = [name for name, _ in runs.started]
    assert names == [*expected[:3], *expected[2:], "chosen"], "the third again, no other"
    with pytest.raises(RunDirectoryError, match="a choice among other cells"):
        other = dataclasses.replace(choice, planned=[])
        private._conclude(other, private.Places(out=tmp_path / "choice"), retries=0, task=runs)


def test_a_failed_trial_stops_the_choice_and_keeps_its_secrets(tmp_path, space, runs):
    choice = open_choice(space, str(tmp_path / "choice"))
    runs.failure = Failure(kind="DataError", message="an image is damaged")
    with pytest.raises(SapfError, match=r"a trial failed \(DataError\): an image is damaged"):
        private.run_choice(choice, say=print, task=runs)
    assert len(runs.started) == 1, "an error of the user's is not tried again"
    assert oct((tmp_path / "choice" / "private").stat().st_mode)[-3:] == "700"
    for path in (tmp_path / "choice" / "private").iterdir():
        assert path.is_dir() or path.name == ".lock" or oct(path.stat().st_mode)[-3:] == "600"


def test_a_poisson_number_of_trials_may_be_none(tmp_path, space, runs, monkeypatch):
    overrides = {"tuning.distribution": "poisson"}
    choice = open_choice(space, str(tmp_path / "choice"), overrides=overrides)
    monkeypatch.setattr(private, "draw_trials", lambda choice, key: [])
    with pytest.raises(SapfError, match=r"no trial was drawn, as happens with probability 0\.018"):
        private.run_choice(choice, say=print, task=runs)
    assert not runs.started


def test_the_plan_is_told_beside_what_all_cells_would_cost(capsys, space, tmp_path):
    lines = plan_lines(open_choice(space))
    assert "mean 4" in lines[0] and "ε = 9.9" in lines[1]
    assert "130 of 1297 training images are held out" in lines[3]
    assert "all 2 cells released cost ε = " in lines[4]
    out = tmp_path / "out"
    code, text, _ = call(capsys, "tune", space, "--private", "--dry_run", "--out", str(out))
    assert code == 0 and "however many trials there are" in text and not out.exists()


@pytest.mark.parametrize(
    ("base", "axes", "message"),
    [
        ({}, {"epsilon": [2.0, 5.0]}, r"privacy\.epsilon = 5\.0: must be 2\.0 in cell epsilon5"),
        ({}, {"dataset": ["digits", "stand_in"]}, r"data\.source = 'stand_in': must be 'digits'"),
        (
            {},
            {"share": {"a": {}, "b": {"tuning.held_out": 0.2}}},
            r"tuning\.held_out = 0\.2: must be 0\.1",
        ),
        (
            {},
            {"rounds": {"few": {}, "many": {"finetune.steps": 3}}},
            "cell many: releases 3 x Gaussian.*leave axes of steps, batches",
        ),
        ({"privacy.accountant": "pld"}, RATES, r"privacy\.accountant = 'pld'.*rdp can"),
        ({"tuning.mean_trials": 0.5}, RATES, r"tuning\.mean_trials = 0\.5: must be at least 1"),
        ({"privacy.reproducible_seed": 1}, RATES, r"privacy\.reproducible_seed = 1: must be left"),
    ],
)
def test_what_cannot_be_chosen_privately_is_one_line(tmp_path, base, axes, message):
    path = write(tmp_path, base={**SMALL, **base}, axes=axes)
    with pytest.raises(SapfError, match=message) as error:
        open_choice(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--public_twin"], "--private = True: is not for --public_twin"),
        (["--max_concurrent", "2"], "--max_concurrent = 2: must be left out"),
        (["--retries", "-1"], "--retries = -1: must be at least 0"),
    ],
)
def test_options_that_do_not_go_together(capsys, space, options, message):
    code, _, err = call(capsys, "tune", space, "--private", *options)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_single_run_is_no_choice(capsys, tmp_path):
    out = tmp_path / "run"
    code, _, err = call(
        capsys,
        "run",
        "--out",
        str(out),
        "--tuning.private=true",
        "--privacy.accountant=rdp",
        "--finetune.batch_size=64",
        "--finetune.steps=2",
    )
    assert code == 2 and "tuning.private = True: is set by `sapf tune --private`" in err
    assert not out.exists()
