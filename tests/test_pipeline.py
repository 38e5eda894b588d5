"""The main job end to end on a tiny model: artifacts, workers, and SIGKILL in every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sapf_ray.config import RunConfig, from_dict
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.evaluation.metrics import known_scores
from sapf_ray.evolution import evolve as evolve_module
from sapf_ray.files import file_digest
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis.writer import read_synthetic
from tests.commands import call
from tests.conftest import PATIENT
from tests.whole_run import BARE, STEPS, command, log_of, releases


def test_run_leaves_every_artifact_and_says_where(plain_run):
    out, printed = plain_run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["epsilon_spent"] <= metrics["epsilon_planned"] == 8
    assert metrics["epsilon_spent"] == pytest.approx(
        Ledger.open(out / "ledger.jsonl").epsilon_spent()
    )
    assert {"fid_glyph", "accuracy", "conditional_fidelity", "judge_accuracy"} <= set(metrics)
    assert {"selection", "finetune", "synthesis", "evaluation"} <= set(metrics["seconds"])
    selection = json.loads((out / "selection.json").read_text())
    assert len(selection["matrices"]) == 8 and len(selection["scores"]) == 24
    assert releases(out / "ledger.jsonl")[1:] == [
        "selection",
        *(f"finetune/step/{i}" for i in range(STEPS)),
    ]
    images, labels = read_synthetic(out / "synthetic")
    assert images.shape == (60, 8, 8, 3) and np.bincount(labels).tolist() == [30, 30]
    card = (out / "privacy_card.md").read_text()
    assert "NOT FOR RELEASE" in card.upper()  # the seed is known
    for words in (
        "sapf: plan: ε = 8 at δ",
        "minutes: start",
        "  finetune",  # a line of progress, for the output is no terminal
        "ε spent / planned",
        "accuracy",
        "conditional fidelity (not private)",
        "mlflow ui --backend-store-uri",
        "privacy_card.md",
        f"for sapf verify: {file_digest(out / 'manifest.json')}",
    ):
        assert words in printed
    assert not (out / "private").exists()


def test_orchestration_is_told_per_stage_and_the_log_has_every_stage(plain_run):
    out, printed = plain_run
    metrics = json.loads((out / "metrics.json").read_text())
    cost, seconds = metrics["orchestration"], metrics["seconds"]
    stages = ["plan", "latents", "selection", "finetune", "synthesis", "pictures", "evaluation"]
    assert list(seconds) == stages and list(cost) == [*stages, "outside_stages", "total_share"]
    for stage in stages[1:]:  # plan has no work of its own, all others have
        assert 0 <= cost[stage] < seconds[stage]
    lost, whole = (
        sum(cost[stage] for stage in stages) + cost["outside_stages"],
        sum(seconds.values()) + cost["outside_stages"],
    )
    assert (
        cost["total_share"] == pytest.approx(lost / whole, abs=0.01) and cost["outside_stages"] > 0
    )
    assert "orchestration" in printed and "outside the stages" in printed
    events = log_of(out)
    begun = [("stage_started", stage) for stage in stages]
    ended = [("stage_ended", stage) for stage in stages]
    told = [(line["event"], line["stage"]) for line in events]
    assert told == [
        ("run_started", None),
        *(e for pair in zip(begun, ended, strict=True) for e in pair),
        ("run_ended", None),
    ]
    assert [line["seconds"] for line in events if line["event"] == "stage_ended"] == list(
        seconds.values()
    )
    assert {line["run"] for line in events} == {(out / "run_id").read_text()}


def test_tracking_holds_spend_scores_and_pictures(plain_run):
    from mlflow import MlflowClient

    out, _ = plain_run
    saved = json.loads((out / "mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=saved["uri"])
    run = client.get_run(saved["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["privacy.epsilon"] == "8.0"
    scored = json.loads((out / "metrics.json").read_text())["accuracy"]
    assert run.data.metrics["non_private/accuracy"] == scored
    assert "accuracy" not in run.data.metrics
    curve = client.get_metric_history(run.info.run_id, "privacy/epsilon_spent")
    assert [m.value for m in curve] == sorted(m.value for m in curve) and len(curve) >= 5
    assert curve[-1].value <= 8
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"pictures", "adapter", "ledger.jsonl", "selection.json", "privacy_card.md"} <= names
    assert "run.log.jsonl" not in names
    assert (
        0 < run.data.metrics["orchestration/total_share"] < 1
        and "orchestration/finetune" in run.data.metrics
    )
    assert run.data.tags["privacy.release"] == "no: a seeded run"
    assert run.data.tags["sapf.manifest_sha256"] == file_digest(out / "manifest.json")
    assert run.data.tags["privacy.not_private"] == (
        "accuracy, accuracy_cnn, conditional_fidelity, fid_glyph, judge_accuracy"
    )
    logged = set(run.data.metrics) | set(run.data.params)
    assert not [name for name in logged if "loss" in name or "grad" in name or "realised" in name]


def test_same_command_again_does_nothing_and_other_config_is_refused(
    plain_run, folder, tiny_pipeline, ray_cluster, capsys, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    out, _ = plain_run
    before = {
        p: p.stat().st_mtime_ns for p in (out / "synthetic").iterdir() if p.suffix == ".parquet"
    }
    metrics = json.loads((out / "metrics.json").read_text())
    seconds = metrics["seconds"]
    words = command(folder, tiny_pipeline, out)
    assert call(capsys, *words[3:])[0] == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    metrics_after = json.loads((out / "metrics.json").read_text())
    assert {"n_synthetic", "n_reference", "n_test", "synthesis_idle_share"} <= metrics_after.keys()
    assert known_scores(metrics_after) == known_scores(metrics)
    after = metrics_after["seconds"]
    assert all(after[stage] >= seconds[stage] for stage in seconds), (
        "what the first start took is not forgotten"
    )
    assert len(releases(out / "ledger.jsonl")) == STEPS + 2
    code, _, said = call(capsys, *words[3:], "--saliency.ratio", "0.5")
    assert code == 2 and "saliency.ratio = 0.3, requested is 0.5" in said
    assert said.count("\n") == 1


def test_tracking_server_down_is_told_before_anything_is_spent(
    folder, tiny_pipeline, tmp_path, ray_cluster, capsys
):
    out = tmp_path / "run"
    words = command(folder, tiny_pipeline, out, "--tracking.uri", "http://127.0.0.1:9")
    code, _, said = call(capsys, *words[3:])
    assert code == 2
    assert "http://127.0.0.1:9" in said
    assert said.count("\n") == 1
    assert not (out / "ledger.jsonl").exists()


def test_unreadable_image_is_told_before_anything_is_spent(
    folder, tiny_pipeline, tmp_path, ray_cluster, capsys
):
    broken = tmp_path / "images"
    shutil.copytree(folder, broken)
    for path in (broken / "dark_cell").iterdir():  # some of them are in the training split
        path.write_bytes(b"not a picture")
    words = command(broken, tiny_pipeline, tmp_path / "run", *BARE)
    code, _, said = call(capsys, *words[3:])
    assert code == 2
    assert f"dark_cell/{PATIENT}-0" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


class Killed(BaseException):
    pass


def evolving(folder: Path, model: Path) -> RunConfig:
    return from_dict(
        {
            "data": {"source": "image_folder", "path": str(folder)},
            "model": {"path": str(model)},
            "privacy": {"epsilon": 8.0, "accountant": "rdp", "reproducible_seed": 5},
            "finetune": {"steps": 0},
            "evolution": {"enabled": True, "iterations": 2, "population": 3, "lookahead": 1},
            "synthesis": {"n_images": 20, "steps": 2, "shard_size": 40},
            "evaluation": {"enabled": False},
            "tracking": {"enabled": False},
        }
    )


@pytest.fixture(scope="module")
def killed(folder, tiny_pipeline, tmp_path_factory, ray_cluster) -> Path:
    """A run directory whose first histogram was paid for, and its noisy counts lost."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evolve_module, "threshold_votes", raise_killed)
        with pytest.raises(Killed):
            run(evolving(folder, tiny_pipeline), str(out))
    assert releases(out / "ledger.jsonl")[1:] == ["evolution/histogram/0"]
    return out


def raise_killed(*arguments: object) -> None:
    raise Killed


def test_evolution_continues_after_a_kill_and_pays_each_histogram_once(
    killed, folder, tiny_pipeline, tmp_path
):
    config, out = evolving(folder, tiny_pipeline), tmp_path / "run"
    shutil.copytree(killed, out)
    result = run(config, str(out))
    ledger = Ledger.open(out / "ledger.jsonl")
    assert [(e.release, e.replay) for e in ledger.events()] == [
        ("evolution/histogram/0", False),
        ("evolution/histogram/0", True),
        ("evolution/histogram/1", False),
    ]
    assert (
        ledger.epsilon_spent() == pytest.approx(result.plan.composed_epsilon, rel=1e-9)
        and result.plan.composed_epsilon <= 8
    )
    assert not (out / "private").exists() and not (out / "evolution").exists()
    alone = tmp_path / "alone"
    run(config, str(alone))
    for one, other in zip(
        read_synthetic(out / "synthetic"), read_synthetic(alone / "synthetic"), strict=True
    ):
        assert np.array_equal(one, other)

    (shard,) = (alone / "synthetic").glob("*.parquet")
    made = shard.stat().st_mtime_ns
    run(config, str(alone))  # done: nothing is read, paid or made
    assert shard.stat().st_mtime_ns == made and len(releases(alone / "ledger.jsonl")) == 3
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(BudgetError, match=r"noise_key: gone, but ledger\.jsonl shows releases"):
        run(config, str(alone))


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("noise_key", None, BudgetError, "gone, but"),
        ("data_fingerprint", "of other images", RunDirectoryError, "data set changed"),
    ],
)
def test_evolution_refuses_a_lost_key_and_other_images(
    killed, folder, tiny_pipeline, tmp_path, file, content, error, words
):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    path = out / "private" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=words):
        run(evolving(folder, tiny_pipeline), str(out))
    assert len(releases(out / "ledger.jsonl")) == 2
