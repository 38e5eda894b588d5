"""The structured log.

Whole lines whatever happens, one run id over all starts, nothing but the events.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from sapf_ray.errors import DataError
from sapf_ray.runs import runlog
from sapf_ray.runs.clock import Clock
from sapf_ray.runs.directory import RunDirectory


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(run: RunDirectory, resumed: bool):
    return runlog.start_of_run(runlog.Place(path=str(run.log), run=run.run_id()), resumed)


def test_every_start_appends_whole_lines_under_one_run_id(tmp_path):
    run = RunDirectory(tmp_path)
    runlog.event("run_started")  # no run is recorded
    assert not run.log.exists()
    with pytest.raises(DataError), start(run, False):
        with Clock(run=run)("latents"):
            raise DataError("/photos/jane_doe.png: broken")
    with run.log.open("a") as f:
        f.write('{"torn by a los')
    with pytest.raises(KeyboardInterrupt), start(RunDirectory(tmp_path), True):
        raise KeyboardInterrupt
    with start(run, True):
        stage = Clock(run=run)
        with stage("selection"):
            runlog.event("task_retried", runlog.WARNING, attempt=1)
        runlog.event("run_ended", seconds=2.5)
    runlog.event("run_ended", seconds=2.5)
    text = run.log.read_text()
    assert "jane_doe" not in text and text.endswith("\n")
    run.log.write_text(text.replace('{"torn by a los\n', ""))
    found = lines(run.log)
    assert [(line["event"], line["level"], line["stage"]) for line in found] == [
        ("run_started", "info", None),
        ("stage_started", "info", "latents"),
        ("stage_failed", "error", "latents"),
        ("run_failed", "error", None),
        ("run_resumed", "info", None),
        ("run_interrupted", "error", None),
        ("run_resumed", "info", None),
        ("stage_started", "info", "selection"),
        ("task_retried", "warning", "selection"),
        ("stage_ended", "info", "selection"),
        ("run_ended", "info", None),
    ]
    assert {line["run"] for line in found} == {run.run_id()} and re.fullmatch(
        "[0-9a-f]{32}", run.run_id()
    )
    times = [line["time"] for line in found]
    assert times == sorted(times) and all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times
    )
    assert found[2]["error"] == found[3]["error"] == "DataError"
    assert found[8]["attempt"] == 1 and found[10]["seconds"] == 2.5
    assert (
        found[9]["seconds"] == stage.seconds["selection"]
        and found[9]["orchestration"] == stage.orchestration["selection"]
    )


def test_a_log_that_cannot_be_written_costs_the_lines_and_nothing_else(tmp_path, capfd):
    with runlog.recording(runlog.Place(path=str(tmp_path / "gone" / "run.log.jsonl"), run="r")):
        runlog.event("run_started")
    full = Path("/dev/full")
    if full.exists():
        with runlog.recording(runlog.Place(path=str(full), run="r")):
            runlog.event("run_started")
    assert capfd.readouterr().err == ""


def test_the_same_lines_are_shown_on_stderr(tmp_path, capsys):
    path = tmp_path / "run.log.jsonl"
    with runlog.shown(), runlog.recording(runlog.Place(path=str(path), run="r")):
        runlog.event("run_started")
    assert capsys.readouterr().err == path.read_text() != ""


def test_lost_train_workers_are_told_from_ray_trains_process(tmp_path):
    import ray.cloudpickle as cloudpickle

    from sapf_ray.finetune.restarts import RestartEvents

    path = tmp_path / "run.log.jsonl"
    with runlog.recording(runlog.Place(path=str(path), run="r")), runlog.stage_events("finetune"):
        place = runlog.here()
    assert place is not None and runlog.here() is None
    callback = cloudpickle.loads(cloudpickle.dumps(RestartEvents(place, 3)))
    callback.after_exception(None, {1: ValueError("of record 7"), 0: ValueError("of record 8")})
    callback.after_exception(None, {0: OSError()})
    _, first, second = lines(path)
    assert (
        first["event"],
        first["stage"],
        first["ranks"],
        first["error"],
        first["restart"],
        first["of"],
    ) == ("workers_lost", "finetune", [0, 1], "ValueError", 1, 3)
    assert (second["ranks"], second["restart"]) == ([0], 2) and "record" not in path.read_text()


def test_a_task_that_ray_did_again_is_told(ray_cluster, tmp_path):
    import ray

    from sapf_ray import cluster
    from sapf_ray.runs.worktime import timed

    @ray.remote(max_retries=3)
    @timed
    def dies_once(mark: Path) -> str:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    path = tmp_path / "run.log.jsonl"
    with runlog.recording(runlog.Place(path=str(path), run="r")), runlog.stage_events("latents"):
        assert cluster.result(dies_once.remote(tmp_path / "mark")) == "done"
    assert [(line["event"], line["stage"], line.get("attempt")) for line in lines(path)] == [
        ("stage_started", "latents", None),
        ("task_retried", "latents", 1),
    ]
