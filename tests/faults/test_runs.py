"""Whole runs hit by faults: they end by themselves or by the same command, pay once, and release
the very same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.chaos import kill_tree, ray_workers, released
from sapf_ray.privacy.ledger import Ledger
from tests.faults.processes import once, train_ranks, wait_for
from tests.faults.runs import Command, assert_paid_once, make_folder

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def command(folder, tiny_pipeline, tmp_path) -> Iterator[Callable[..., Command]]:
    made: list[Command] = []

    def make(*extra: str, out: Path | None = None) -> Command:
        made.append(Command(folder, tiny_pipeline, out or tmp_path / "run", *extra))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def expected(folder, tiny_pipeline, tmp_path_factory) -> dict[str, str]:
    """What the unfaulted run releases."""
    whole = Command(folder, tiny_pipeline, tmp_path_factory.mktemp("whole") / "run")
    whole.finish()
    whole.close()
    assert_paid_once(whole.out)
    return released(whole.out)


def test_a_worker_of_every_stage_dies_and_the_run_ends_by_itself(command, expected):
    run = command()
    with run.started() as process:

        def strike(title: str) -> Callable[[], None]:
            return lambda: ray_workers(process.pid, title)[0].kill()

        def at(title: str) -> Callable[[], object]:
            return lambda: ray_workers(process.pid, title)

        def strike_rank_0() -> None:
            os.kill(train_ranks(run.session)[0], 9)

        with (
            once("encoding", at("ray::encode"), strike("ray::encode")),
            once("selection", at("ray::score"), strike("ray::score")),
            once("rank 0 in step 6", lambda: "finetune/step/6" in run.releases(), strike_rank_0),
            once(
                "sampling",
                at("ray::SamplingActor.make_shard"),
                strike("ray::SamplingActor.make_shard"),
            ),
        ):
            _, said = process.communicate(timeout=280)
        assert process.returncode == 0, said[-3000:]
    assert_paid_once(run.out)
    assert released(run.out) == expected
    events = [json.loads(line) for line in (run.out / "run.log.jsonl").read_text().splitlines()]
    told = {(event["event"], event["stage"]) for event in events if event["level"] == "warning"}
    assert told == {
        ("task_retried", "latents"),
        ("task_retried", "selection"),
        ("workers_lost", "finetune"),
        ("task_retried", "synthesis"),
    }


def test_the_driver_dies_and_the_newest_checkpoint_is_torn(command, expected):
    run = command()
    run.kill_driver_when("step 13", lambda: "finetune/step/13" in run.releases())
    checkpoints = sorted((run.out / "checkpoints" / "finetune").glob("checkpoint_*/state.pt"))
    assert checkpoints
    checkpoints[-1].write_bytes(checkpoints[-1].read_bytes()[:5000])
    snapshot = run.out / "checkpoints" / "finetune" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:100])
    run.finish()
    assert_paid_once(run.out)
    assert released(run.out) == expected


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(command, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        run = command("--finetune.max_failures=0", out=disk / "run")
        ballast = disk / "ballast"

        def fill() -> None:
            with open(ballast, "wb", buffering=0) as f:
                try:
                    while f.write(bytes(4096)):
                        pass
                except OSError:
                    pass

        with (
            once("step 5", lambda: "finetune/step/5" in run.releases(), fill),
            run.started() as process,
        ):
            _, said = process.communicate(timeout=280)
        assert process.returncode == 2, said[-3000:]
        assert said.count("\n") == 1 and "No space left" in said, said
        ballast.unlink()
        run.finish()
        assert_paid_once(run.out)
        assert released(run.out) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_mlflow_server_dies_in_mid_run(command, expected, tmp_path):
    """The run is not lost: it ends with a warning, and the same command logs the rest when the
    server is back.
    """
    import socket

    from mlflow import MlflowClient

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"

    def serve() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--workers",
                "1",
                "--backend-store-uri",
                f"sqlite:///{tmp_path / 'mlflow.db'}",
                "--artifacts-destination",
                str(tmp_path / "artifacts"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def up() -> bool:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                return True
            except OSError:
                time.sleep(0.2)
                return False

        wait_for("the server's start", up, lambda: server.poll() is None)
        return server

    run = command("--tracking.enabled=true", f"--tracking.uri={uri}")
    server = serve()
    try:
        with once(
            "step 2", lambda: "finetune/step/2" in run.releases(), lambda: kill_tree(server.pid)
        ):
            said = run.finish().stderr
        assert "MLflow" in said and uri in said and said.count("\n") == 1
        assert_paid_once(run.out)
        assert released(run.out) == expected
        server = serve()
        assert run.finish().stderr == ""
        saved = json.loads((run.out / "mlflow_run.json").read_text())
        logged = MlflowClient(tracking_uri=uri).get_run(saved["run_id"])
        assert logged.info.status == "FINISHED"
        spent = Ledger.open(run.ledger).epsilon_spent()
        assert logged.data.metrics["privacy/epsilon_spent"] == pytest.approx(spent)
    finally:
        kill_tree(server.pid)
