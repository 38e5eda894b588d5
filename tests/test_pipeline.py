"""The main job end to end on a tiny model: artifacts, workers, and SIGKILL in every stage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sapf_ray.cli import main
from sapf_ray.config import RunConfig, from_dict
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.evaluation.metrics import known_scores
from sapf_ray.evolution import evolve as evolve_module
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis.writer import read_synthetic
from tests.commands import call

STEPS = 12
BARE = ("--evaluation.enabled=false", "--tracking.enabled=false")
# of what is started in a process of its own: a second worker costs its imports
ONE_CORE = ("--cluster.num_cpus=1",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of PNGs, 20x28 pixels: another size than the model's."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark_cell", "bright_cell")):
        (root / name).mkdir()
        for i in range(40):
            pixels = generator.integers(0, 100, (28, 20, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def command(folder: Path, model: Path, out: Path, *extra: str) -> list[str]:
    options = {
        "data.source": "image_folder",
        "data.path": folder,
        "model.path": model,
        "privacy.epsilon": 8,
        "privacy.accountant": "rdp",
        "privacy.reproducible_seed": 5,
        "saliency.shard_size": 20,
        "finetune.batch_size": 16,
        "finetune.steps": STEPS,
        "finetune.checkpoint_every": 4,
        "finetune.micro_batch_size": 8,
        "finetune.cpus_per_worker": 1,
        "synthesis.n_images": 60,
        "synthesis.steps": 3,
        "synthesis.shard_size": 10,
        "synthesis.num_actors": 1,
        "evaluation.epochs": 2,
        "cluster.num_cpus": 2,
        "out": out,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "sapf_ray.cli", "run", *flags, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "160"} | {
        "MLFLOW_TRACKING_URI": ""
    }


def finish(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def kill_when(words: list[str], reached: Callable[[], bool]) -> None:
    """Starts the command and SIGKILLs it as soon as ``reached``, with all of its processes: an
    orphaned worker would train on until Ray misses its driver.
    """
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, (
            f"ended before it could be killed: {process.stderr.read()[-2000:]}"
        )
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.02)
    parent = psutil.Process(process.pid)
    for victim in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run.log.jsonl").read_text().splitlines()]


def releases(ledger: Path) -> list[str]:
    if not ledger.exists():
        return []
    return [
        json.loads(line).get("release", "")
        for line in ledger.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


@pytest.fixture(scope="module")
def plain_run(folder, tiny_pipeline, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, finish(command(folder, tiny_pipeline, out))


@pytest.fixture(scope="module")
def bare_run(folder, tiny_pipeline, tmp_path_factory, ray_cluster) -> Path:
    """A whole run without evaluation and tracking, in this process and its warm workers."""
    out = tmp_path_factory.mktemp("bare") / "run"
    assert main(command(folder, tiny_pipeline, out, *BARE)[3:]) == 0
    return out


def test_run_leaves_every_artifact_and_says_where(plain_run):
    out, printed = plain_run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["epsilon_spent"] <= metrics["epsilon_planned"] == 8
    assert metrics["epsilon_spent"] == pytest.approx(
        Ledger.open(out / "ledger.jsonl").epsilon_spent()
    )
    assert {"fid_glyph", "accuracy"} <= set(metrics)
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
        "ε spent / planned",
        "accuracy",
        "mlflow ui --backend-store-uri",
        "privacy_card.md",
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
    assert (
        run.data.metrics["accuracy"] == json.loads((out / "metrics.json").read_text())["accuracy"]
    )
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
    assert run.data.tags["privacy.not_private"] == "accuracy, accuracy_cnn, fid_glyph"
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


def test_killed_in_every_stage_it_continues_and_never_understates(
    bare_run, folder, tiny_pipeline, tmp_path
):
    """The run that was killed four times spends what was planned and makes the very images of the
    one that was not.
    """
    whole = bare_run
    out = tmp_path / "run"
    ledger = out / "ledger.jsonl"
    words = command(folder, tiny_pipeline, out, *BARE, *ONE_CORE)
    kill_when(words, lambda: (out / "private" / "latents").exists())
    kill_when(words, lambda: "selection" in releases(ledger))
    kill_when(words, lambda: "finetune/step/4" in releases(ledger))
    kill_when(words, lambda: len(list((out / "synthetic").glob("*.parquet"))) > 0)
    finish(words)
    events = log_of(out)  # whole lines, though the driver was killed four times
    starts = [line["event"] for line in events if line["event"].startswith("run_")]
    assert starts == ["run_started", *["run_resumed"] * 4, "run_ended"]
    assert len({line["run"] for line in events}) == 1
    (step,) = [
        line["step"]
        for line in events
        if line["event"] == "stage_resumed" and line["stage"] == "finetune"
    ]
    assert step % 4 == 0 and step > 0
    opened = Ledger.open(ledger)
    assert opened.epsilon_spent() == pytest.approx(
        Ledger.open(whole / "ledger.jsonl").epsilon_spent()
    )
    paid = [e.release for e in opened.events() if not e.replay]
    assert sorted(paid) == sorted(releases(whole / "ledger.jsonl")[1:])
    selections = [json.loads((run / "selection.json").read_text()) for run in (out, whole)]
    for selection in selections:
        del selection["event"][
            "replay"
        ]  # it was one where the kill came between the ledger's line and this file
    assert selections[0] == selections[1]
    for killed, alone in zip(
        read_synthetic(out / "synthetic"), read_synthetic(whole / "synthetic"), strict=True
    ):
        assert np.array_equal(killed, alone)


def test_ctrl_c_in_training_says_how_to_continue(folder, tiny_pipeline, tmp_path):
    """Ray Train takes SIGINT for itself and exits with 0 unless kept off the main thread."""
    out = tmp_path / "run"
    words = command(
        folder,
        tiny_pipeline,
        out,
        "--finetune.steps",
        "5000",
        "--saliency.ratio=1",
        *BARE,
        *ONE_CORE,
    )
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # a suite started in the background hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while "finetune/step/1" not in releases(out / "ledger.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)  # only against a hang
    assert process.returncode == 130
    assert "The same command continues: sapf run" in said and "Traceback" not in said


def test_two_workers_give_the_same_adapter_to_the_last_bit(
    bare_run, folder, tiny_pipeline, tmp_path, capsys
):
    from safetensors.numpy import load_file

    whole = bare_run
    out = tmp_path / "run"
    words = command(folder, tiny_pipeline, out, *BARE, "--finetune.num_workers", "2")
    assert call(capsys, *words[3:])[0] == 0
    name = "adapter/pytorch_lora_weights.safetensors"
    one, two = load_file(whole / name), load_file(out / name)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert "accuracy" not in json.loads((out / "metrics.json").read_text())


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
    (broken / "dark_cell" / "3.png").write_bytes(b"not a picture")
    words = command(broken, tiny_pipeline, tmp_path / "run", *BARE)
    code, _, said = call(capsys, *words[3:])
    assert code == 2
    assert "3.png" in said
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
