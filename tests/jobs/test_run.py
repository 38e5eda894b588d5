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
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from jobs.chaos import kill_tree, released
from jobs.run import main
from jobs.runtime_env import ROOT, runtime_env
from sapf_ray.errors import ClusterError, ConfigError
from sapf_ray.submit import PACKAGE, named_files, relative_out, requirements, stage, submit
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
    pinned = dict(requirement.split("==") for requirement in requirements(["jsonargparse[x]"]))
    assert pinned["diffusers"] == metadata.version("diffusers")
    assert pinned["jsonargparse[x]"] == metadata.version("jsonargparse")
    assert not any(name.split("[")[0] in ("ray", "pytest", "ruff") for name in pinned)
    assert all("+" not in version for version in pinned.values())
    assert "pip" not in runtime_env("image")
    json.dumps(runtime_env())


def packed_files(env: dict, folder: Path) -> set[str]:
    """Names in the packages that Ray makes of a runtime environment."""
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

    packed = set()
    for i, module in enumerate(env["py_modules"]):
        get_uri_for_directory(module, include_gitignore=True)  # the name is a hash of the content
        target = folder / f"{i}.zip"
        create_package(module, target, True, include_parent_dir=True)
        packed |= set(zipfile.ZipFile(target).namelist())
    return packed


def test_a_job_carries_code_and_the_files_it_names_and_nothing_beside_them(tmp_path):
    """As Ray packs it: no photographs, notes or keys that lie beside the code or the grid."""
    env = runtime_env("image", tmp_path / "staged")
    assert "working_dir" not in env
    packed = packed_files(env, tmp_path)
    assert {name.split("/")[0] for name in packed} == {PACKAGE.name, "jobs"}
    assert {"sapf_ray/cli.py", "sapf_ray/tune_spaces/digits.yaml", "jobs/run.py"} <= packed
    assert not any("__pycache__" in name for name in packed)
    assert env == runtime_env("image", tmp_path / "staged"), "again, in the same folder"

    (tmp_path / "photos").mkdir()
    for name in ("photos/1.png", "photos/list.yaml", "mine.yaml", "key.pem"):
        (tmp_path / name).touch()
    words = ["tune", "mine.yaml", "--config=gone.yaml", f"--config={tmp_path}/mine.yaml"]
    assert named_files(words, tmp_path) == [Path("mine.yaml")]
    assert named_files(["run", "--config", "../mine.yaml"], tmp_path / "photos") == []


def test_what_is_sent_of_sapf_ray_is_what_its_wheel_holds(tmp_path):
    packed = packed_files(runtime_env("image", tmp_path / "staged"), tmp_path)
    sent = {name.removeprefix("sapf_ray/") for name in packed if name.startswith("sapf_ray/")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    held: set[Path] = set(PACKAGE.rglob("*.py"))
    for pattern in project["tool"]["setuptools"]["package-data"]["sapf_ray"]:
        held |= {path for path in PACKAGE.glob(pattern) if path.is_file()}
    assert sent == {path.relative_to(PACKAGE).as_posix() for path in held}


SENSITIVE = [
    "photos/patient-7.png",
    "photos/nested/patient-8.JPG",
    "photos/metadata.csv",
    "photos/list.yaml",
    "train/zero/1.tif",
    "dataset.npz",
    "labels.json",
    "scan.dcm",
    "notes.txt",
    ".env",
    ".git/config.py",
    "key.pem",
    "mlflow.db",
    "runs/x/private/noise_key",
    "venv/pyvenv.cfg",
    "venv/lib/other.py",
]


@pytest.mark.parametrize("module", ["mine", "one.py"])
def test_images_in_the_midst_of_the_code_stay_where_they_are(module, tmp_path):
    package = tmp_path / "mine"
    for name in [*SENSITIVE, "__init__.py", "sub/rows.py", "empty patient-9/"]:
        path = package / name
        folder = path if name.endswith("/") else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if folder is not path:
            path.write_text("x")
    (tmp_path / "one.py").touch()
    (tmp_path / "photo.png").touch()
    staged = stage([tmp_path / module], tmp_path / "staged")
    if module == "one.py":
        assert staged == [str(tmp_path / "staged" / "one.py")]
        assert [path.name for path in (tmp_path / "staged").iterdir()] == ["one.py"]
        return
    packed = packed_files({"py_modules": staged}, tmp_path)
    assert packed == {"mine/__init__.py", "mine/sub/rows.py"}


@pytest.mark.parametrize("name", ["photos", "data.npz", "gone", "photos/1.png"])
def test_a_module_without_code_is_refused_before_anything_is_sent(name, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    (tmp_path / "data.npz").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--modules = '.*{name}'"):
        submit(["plan"], address="http://127.0.0.1:9", install="image", modules=[name])


def test_a_cluster_that_is_not_there_is_one_line():
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:9: Failed to connect"):
        submit(["plan"], address="http://127.0.0.1:9", install="image")


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
    assert words[:2] == ["sapf", "run"] and relative_out(words[1:]) is None
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
def test_sapf_submit_runs_it_on_the_cluster_and_tells_its_errors(head, tiny_pipeline, tmp_path):
    """From an empty folder, with a grid of the user's own; without a token it is one line."""
    grid = {"preset": "digits", "axes": {"epsilon": [3, 10]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(grid))

    def submit_command(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "sapf_ray.cli", "submit", "--address", head.url]
        return subprocess.run(
            [*words, "--install=image", "--", *command],
            capture_output=True,
            text=True,
            env=head.environment | {"PYTHONPATH": str(ROOT)} | environment,
            timeout=280,
            cwd=tmp_path,
        )

    done = submit_command("tune", "mine.yaml", "--dry-run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "epsilon" in done.stdout
    wrong = submit_command("plan", "--privacy.epsilon=-1")
    assert wrong.returncode == 2
    assert "sapf: error: privacy.epsilon" in wrong.stdout
    assert "failed with exit code 2" in wrong.stderr
    for mode in ("token", "disabled"):
        refused = submit_command("plan", RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN="")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in refused.stderr


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
