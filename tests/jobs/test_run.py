"""What a submitted job is made of, and a real submission to a real Ray head with its dashboard."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from jobs.chaos import kill_tree, released
from jobs.run import main, relative_out
from jobs.runtime_env import ROOT, requirements, runtime_env
from tests.faults.processes import wait_for
from tests.faults.runs import Command, assert_paid_once, make_folder

CLUSTER = ROOT / "jobs" / "cluster"


@pytest.mark.parametrize(
    ("words", "relative"),
    [
        (["run", "--out", "runs/x"], "runs/x"),
        (["run", "--out=runs/x"], "runs/x"),
        (["run", "--out"], ""),
        (["run", "--out", "/shared/x"], None),
        (["run", "--out=/shared/x"], None),
        (["plan", "--json"], None),
    ],
)
def test_a_relative_out_would_be_lost_with_the_jobs_folder(words, relative, capsys):
    assert relative_out(words) == relative
    if relative:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "runs/x" in said and "absolute path" in said


def test_the_runtime_environment_is_pyprojects_with_the_versions_here():
    pinned = dict(requirement.split("==") for requirement in requirements())
    assert (
        pinned["diffusers"] == metadata.version("diffusers") and pinned["jsonargparse[signatures]"]
    )
    assert not any(name.split("[")[0] in ("ray", "pytest", "ruff") for name in pinned)
    assert all("+" not in version for version in pinned.values())
    env = runtime_env("image")
    assert "pip" not in env and Path(env["working_dir"]) == ROOT and ".git" in env["excludes"]
    json.dumps(runtime_env())


def test_cluster_files_are_what_kuberay_and_ray_up_take():
    cluster, claim = yaml.safe_load_all((CLUSTER / "raycluster.yaml").read_text())
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (
        cluster["kind"] == "RayCluster"
        and job["kind"] == "RayJob"
        and claim["kind"] == "PersistentVolumeClaim"
    )
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    for template in (workers["template"], cluster["spec"]["headGroupSpec"]["template"]):
        shared = [v for v in template["spec"]["volumes"] if v["name"] == "shared"]
        assert shared[0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    words = job["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "jobs.run", "run"] and relative_out(words[3:]) is None
    assert cluster["spec"]["rayVersion"] in (CLUSTER / "Dockerfile").read_text()

    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Head:
    """A Ray head that `ray start` made, apart from every other Ray, with a token of its own."""

    url: str
    environment: dict[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    directory = tempfile.mkdtemp(
        prefix="head", dir="/tmp"
    )  # sockets below have a limit of 107 characters
    port = free_port()
    token = secrets.token_hex(32)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    process = subprocess.Popen(
        [
            "ray",
            "start",
            "--head",
            f"--port={free_port()}",
            f"--dashboard-port={port}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--temp-dir={directory}",
            "--num-cpus=2",
            f"--object-store-memory={200 * 2**20}",
            "--block",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/version", headers={"Authorization": f"Bearer {token}"}
    )

    def up() -> bool:
        try:
            urllib.request.urlopen(asked, timeout=1).close()
            return True
        except OSError:
            return False

    try:
        wait_for("the job server's start", up, lambda: process.poll() is None)
        yield Head(f"http://127.0.0.1:{port}", environment)
    finally:
        kill_tree(process.pid)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.long
def test_ray_job_submit_runs_it_on_the_cluster_and_tells_its_errors(head, tiny_pipeline, tmp_path):
    folder = make_folder(tmp_path / "images")
    run = Command(folder, tiny_pipeline, tmp_path / "run", program=("-m", "jobs.run"))
    words = [
        "python" if word == sys.executable else word for word in run.words if "num_cpus" not in word
    ]

    def submit(*command: str) -> subprocess.CompletedProcess[str]:
        env = json.dumps(runtime_env("image"))
        return subprocess.run(
            [
                "ray",
                "job",
                "submit",
                "--address",
                head.url,
                "--runtime-env-json",
                env,
                "--",
                *command,
            ],
            capture_output=True,
            text=True,
            env=head.environment,
            timeout=280,
            cwd=ROOT,
        )

    done = submit(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert_paid_once(run.out)
    whole = Command(folder, tiny_pipeline, tmp_path / "whole")
    whole.finish()
    assert released(run.out) == released(whole.out)
    wrong = submit(
        "python",
        "-m",
        "jobs.run",
        "run",
        "--out=/tmp/never",
        "--finetune.gpus_per_worker=1",
        "--data.source=digits",
        "--finetune.batch_size=64",
        "--tracking.enabled=false",
    )
    assert wrong.returncode != 0
    assert (
        "finetune.gpus_per_worker: asks for 1 GPUs in all, the cluster has 0"
        in wrong.stdout + wrong.stderr
    )
    for one in (run, whole):
        one.close()
