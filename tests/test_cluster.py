"""What a cluster must have, said in one line before anything is read; runs over two nodes, and a
lost node.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs.chaos import kill_tree, ray_workers, released
from sapf_ray import cluster
from sapf_ray.config import ClusterConfig, FinetuneConfig
from sapf_ray.errors import ClusterError
from tests.faults.processes import wait_for
from tests.faults.runs import Command, assert_paid_once, make_folder


def refused(address: str, monkeypatch) -> str:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError) as caught:
        with cluster.session(ClusterConfig(address=address)):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_address_where_nothing_answers_is_told_at_once(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{s.getsockname()[1]}"
    assert "nothing answers there" in refused(free, monkeypatch)
    assert "nothing answers there" in refused("no-such-host.invalid:6379", monkeypatch)
    assert "nothing answers there" in refused("127.0.0.1:port", monkeypatch)
    assert "sapf submit" in refused("ray://127.0.0.1:10001", monkeypatch)


def test_a_local_ray_that_starts_too_late_is_one_line(monkeypatch):
    """On a busy machine: Ray raises a bare Exception then."""

    def too_late(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", too_late)
    with (
        pytest.raises(ClusterError, match=r"timed out .*same command tries again"),
        cluster.session(ClusterConfig()),
    ):
        pass


def test_other_versions_on_the_cluster_are_named(monkeypatch):
    import ray
    from ray._private.utils import check_version_info

    def init(**options):
        check_version_info(
            {"ray_version": "2.9.0", "python_version": "3.9.1"}, "this process"
        )  # Ray's own check

    monkeypatch.setattr(ray, "init", init)
    said = refused("auto", monkeypatch)
    assert (
        "the cluster runs Ray 2.9.0 on Python 3.9.1" in said
        and f"this process Ray {ray.__version__} on Python" in said
    )


def nodes(*resources: dict[str, float]):
    return [{"Alive": True, "Resources": r} for r in resources]


def start_options(monkeypatch, config: ClusterConfig, spills: Path) -> tuple[dict, list[Path]]:
    """Options of ``ray.init``, and what lies in the spilling folder while a session is up."""
    import ray

    given = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster.session(config, spills=spills):
        there = [path for path in [spills] if path.exists()]
        assert not there or there[0].stat().st_mode & 0o777 == 0o700
        assert not any(list(path.iterdir()) for path in there), "nothing of an earlier start"
    return given, there


def test_a_local_ray_spills_into_the_run_directory_alone(monkeypatch, tmp_path):
    spills = tmp_path / "an odd % näme" / "spilled"
    spills.mkdir(parents=True)
    (spills / "latents of a start that was killed").write_text("")
    options, there = start_options(monkeypatch, ClusterConfig(), spills)
    assert options["object_spilling_directory"] == str(spills) and there == [spills]
    assert not spills.exists(), "gone with the session"


def test_neither_a_clusters_spilling_nor_a_path_that_ray_cannot_read_is_set(monkeypatch, tmp_path):
    for config, name in ((ClusterConfig(address="auto"), "run"), (ClusterConfig(), "run #3")):
        options, there = start_options(monkeypatch, config, tmp_path / name / "spilled")
        assert "object_spilling_directory" not in options and not there


def test_a_unit_must_fit_on_one_node(monkeypatch):
    import ray

    dead = {"Alive": False, "Resources": {"CPU": 99}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes({"CPU": 3, "GPU": 1}, {"CPU": 3}), dead])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0, "GPU": 1.0})
    assert [cluster.room(c) for c in (1, 2, 3, 4, 0.5)] == [6, 2, 2, 0, 12]
    assert [cluster.room(1, g) for g in (1, 0.5, 0.1, 2)] == [1, 2, 3, 0]

    def want(count: int, cpus: float, gpus: float) -> list[cluster.Want]:
        return [cluster.Want(section="finetune", unit="worker", count=count, cpus=cpus, gpus=gpus)]

    cluster.require(want(2, 3, 0))
    with pytest.raises(
        ClusterError, match=r"finetune.cpus_per_worker: asks for 8 CPUs in all, the cluster has 6"
    ):
        cluster.require(want(2, 4, 0))
    with pytest.raises(
        ClusterError, match=r"finetune.gpus_per_worker: asks for 2 GPUs in all, the cluster has 1"
    ):
        cluster.require(want(2, 1, 1))
    with pytest.raises(
        ClusterError, match=r"finetune.cpus_per_worker: 3 x .*room for 2"
    ):  # 6 cores, but 2 do not fit thrice
        cluster.require(want(3, 2, 0))


@pytest.mark.parametrize(
    ("given", "workers", "expected"), [(0.0, 2, 3.0), (0.0, 3, 1.0), (2.5, 2, 2.5), (0.0, 1, 4.0)]
)
def test_workers_share_the_cores_so_that_all_of_them_fit(monkeypatch, given, workers, expected):
    """Cores 4 + 3: an equal share of three workers would be 2 cores, of which only three fit; of
    two workers 3.
    """
    import ray

    size = ({"CPU": 4}, {"CPU": 3}) if workers < 3 else ({"CPU": 3}, {"CPU": 3})
    monkeypatch.setattr(ray, "nodes", lambda: nodes(*size))
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": float(sum(s["CPU"] for s in size))}
    )
    config = FinetuneConfig(cpus_per_worker=given, num_workers=workers)
    assert cluster.worker_cpus(config) == expected


class TwoNodes:
    """Two Ray nodes of one core each on this machine, apart from every other Ray."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": 100 * 2**20,
                "include_dashboard": False,
                "_system_config": {
                    "health_check_period_ms": 500,
                    "health_check_timeout_ms": 1000,
                    "health_check_failure_threshold": 3,
                },
            },
        )
        self.second = self.add()

    def add(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    def raylet(self, node) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def kill_second(self) -> None:
        """The machine is gone: SIGKILL to its daemon and every worker."""
        kill_tree(self.raylet(self.second).pid)

    def titles(self) -> list[set[str]]:
        """Work now under way on each of the two nodes."""
        found = []
        for node in (self.cluster.head_node, self.second):
            words: list[list[str]] = []
            with suppress(psutil.Error, KeyError):
                words = [p.cmdline() for p in ray_workers(self.raylet(node).pid)]
            found.append({w[0].split(".")[0].strip() for w in words if w})
        return found


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def expected(folder, tiny_pipeline, tmp_path_factory) -> dict[str, str]:
    whole = Command(folder, tiny_pipeline, tmp_path_factory.mktemp("whole") / "run")
    whole.finish()
    whole.close()
    return released(whole.out)


@pytest.mark.long
def test_a_run_spreads_over_two_nodes(two_nodes, folder, tiny_pipeline, tmp_path, expected):
    run = Command(folder, tiny_pipeline, tmp_path / "run", f"--address={two_nodes.cluster.address}")
    seen: list[set[str]] = [set(), set()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for all_, now in zip(seen, two_nodes.titles(), strict=True):
                all_ |= now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run.finish()
    stop.set()
    watcher.join()
    for work in ("ray::encode", "ray::score", "ray::RayTrainWorker", "ray::SamplingActor"):
        assert all(work in node for node in seen), (work, seen)
    assert_paid_once(run.out)
    assert released(run.out) == expected


@pytest.mark.long
def test_a_lost_node_is_waited_for_and_the_run_goes_on(
    two_nodes, folder, tiny_pipeline, tmp_path, expected
):
    run = Command(folder, tiny_pipeline, tmp_path / "run", f"--address={two_nodes.cluster.address}")

    with run.started() as process:
        wait_for(
            "step 6", lambda: "finetune/step/6" in run.releases(), lambda: process.poll() is None
        )
        two_nodes.kill_second()
        time.sleep(3)
        two_nodes.second = two_nodes.add()  # on the main thread: Ray sets signal handlers there
        _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said[-3000:]
    assert_paid_once(run.out)
    assert released(run.out) == expected


@pytest.mark.long
def test_storage_that_a_node_does_not_see_is_named(folder, tiny_pipeline, tmp_path):
    """The second node runs in a mount namespace of its own, where the run directory's folder is
    another file system.
    """
    from ray.cluster_utils import Cluster

    local = tmp_path / "local"
    local.mkdir()
    if subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(local)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to make a mount namespace")
    head = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
        },
    )
    node = subprocess.Popen(
        [
            "unshare",
            "-m",
            "bash",
            "-c",
            'mount -t tmpfs none "$1" && exec ray start --address="$2" --num-cpus=1 --block',
            "bash",
            str(local),
            head.address,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    run = Command(
        folder,
        tiny_pipeline,
        local / "run",
        f"--address={head.address}",
        "--finetune.num_workers=1",
        "--synthesis.num_actors=1",
    )
    try:
        wait_for("the second node's start", lambda: _raylets(node.pid), lambda: node.poll() is None)
        time.sleep(5)  # to register
        with run.started() as process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 2 and said.count("\n") == 1, said
        assert "does not see it" in said and str(local) in said
        assert not run.ledger.exists()
    finally:
        run.close()
        kill_tree(node.pid)
        head.shutdown()


def _raylets(root: int) -> int:
    count = 0
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.Error):
            count += "raylet" in process.name()
    return count
