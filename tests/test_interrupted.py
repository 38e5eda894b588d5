"""Whole runs that are interrupted: SIGKILL in every stage, ctrl-C, another number of workers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis.writer import read_synthetic
from tests.commands import call
from tests.whole_run import (
    BARE,
    ONE_CORE,
    command,
    finish,
    interrupt_when,
    kill_when,
    log_of,
    releases,
)


@pytest.mark.parametrize(
    "stages",
    [
        ("finetune",),
        pytest.param(
            ("latents", "selection", "finetune", "synthesis"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_killed_in_these_stages_it_continues_and_never_understates(
    plain_run, folder, tiny_pipeline, tmp_path, stages
):
    """The run that was killed again and again spends what was planned and makes the very images of
    the one that was not.
    """
    whole, _ = plain_run
    out = tmp_path / "run"
    ledger = out / "ledger.jsonl"
    words = command(folder, tiny_pipeline, out, *BARE, *ONE_CORE)
    reached = {
        "latents": lambda: (out / "private" / "latents").exists(),
        "selection": lambda: "selection" in releases(ledger),
        "finetune": lambda: "finetune/step/4" in releases(ledger),
        "synthesis": lambda: any((out / "synthetic").glob("*.parquet")),
    }
    for stage in stages:
        kill_when(words, reached[stage])
    # Ray Train takes SIGINT for itself and exits with 0 unless kept off the main thread
    code, said = interrupt_when(words, lambda: "finetune/step/6" in releases(ledger))
    assert code == 130
    assert "The same command continues: sapf run" in said and "Traceback" not in said
    finish(words)
    events = log_of(out)  # whole lines, though the driver was killed
    starts = [line["event"] for line in events if line["event"].startswith("run_")]
    resumed = ["run_resumed"] * len(stages)
    assert starts == ["run_started", *resumed, "run_interrupted", "run_resumed", "run_ended"]
    assert len({line["run"] for line in events}) == 1
    resumed_at = [
        line["step"]
        for line in events
        if line["event"] == "stage_resumed" and line["stage"] == "finetune"
    ]
    assert resumed_at and all(step % 4 == 0 and step > 0 for step in resumed_at)
    opened = Ledger.open(ledger)
    assert opened.epsilon_spent() == pytest.approx(
        Ledger.open(whole / "ledger.jsonl").epsilon_spent()
    )
    paid = [e.release for e in opened.events() if not e.replay]
    assert sorted(paid) == sorted(releases(whole / "ledger.jsonl")[1:])
    selections = [json.loads((run / "selection.json").read_text()) for run in (out, whole)]
    for selection in selections:
        # it was one where the kill came between the ledger's line and this file
        del selection["event"]["replay"]
    assert selections[0] == selections[1]
    for killed, alone in zip(
        read_synthetic(out / "synthetic"), read_synthetic(whole / "synthetic"), strict=True
    ):
        assert np.array_equal(killed, alone)


@pytest.mark.long  # tests/finetune and tests/faults show it of the stage alone
def test_two_workers_give_the_same_adapter_to_the_last_bit(
    plain_run, folder, tiny_pipeline, tmp_path, ray_cluster, capsys
):
    from safetensors.numpy import load_file

    whole, _ = plain_run
    out = tmp_path / "run"
    words = command(folder, tiny_pipeline, out, *BARE, "--finetune.num_workers", "2")
    assert call(capsys, *words[3:])[0] == 0
    name = "adapter/pytorch_lora_weights.safetensors"
    one, two = load_file(whole / name), load_file(out / name)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert "accuracy" not in json.loads((out / "metrics.json").read_text())
