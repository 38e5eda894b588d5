"""The driver's fan-out: order, a bounded number of tasks under way, and memory that does not follow
their number.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from jobs import benchmark
from jobs.bench import scheduling
from sapf_ray import cluster

MIB = 2**20


def test_a_late_task_neither_stops_the_others_nor_lets_them_pile_up(ray_cluster):
    import ray

    late = 3

    @ray.remote(num_cpus=0.5)
    def work(i: int) -> int:
        time.sleep(0.5 if i == late else 0)
        return 10 * i

    out, most = [], 0
    submitted = []

    def submit(i: int) -> ray.ObjectRef:
        nonlocal most
        submitted.append(i)
        most = max(most, len(submitted) - len(out))
        return work.remote(i)

    for pair in cluster.as_finished(submit, iter(range(40)), window=6):
        out.append(pair)
    assert submitted == list(range(40)) and most == 6
    assert sorted(out) == [(i, 10 * i) for i in range(40)]
    assert out != sorted(out)
    assert list(cluster.as_finished(submit, [], window=6)) == []


def grown(call: Callable[[], object]) -> float:
    """MiB that this process's own memory grows by at most during the call."""
    me, stop, most = psutil.Process(), threading.Event(), 0

    def own() -> int:
        memory = me.memory_info()
        return memory.rss - memory.shared

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.01):
            most = max(most, own())

    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # what earlier tests freed would hide what this call takes
    before = own()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    most = max(most, own())
    stop.set()
    watcher.join()
    return (most - before) / MIB


@pytest.mark.long
def test_the_drivers_memory_does_not_follow_the_number_of_shards(ray_cluster):
    """A thousand shards of 80 kB each; the twin that keeps what comes back grows by that much."""
    size, shards, bound = 20_000, 1000, 30
    task = scheduling.empty_task(size)

    def keep_all() -> list:
        return [cluster.result(task.remote()) for _ in range(shards)]

    scheduling.fan_out(100, size, task=task)
    few = grown(lambda: scheduling.fan_out(100, size, task=task))
    many = grown(lambda: scheduling.fan_out(shards, size, task=task))
    kept: list = []
    twin = grown(lambda: kept.append(keep_all()))
    print(
        f"driver grows by {few:.1f} MiB over 100 shards, {many:.1f} over {shards}, "
        f"{twin:.1f} where it keeps them"
    )
    assert torch.equal(scheduling.fan_out(50, size, task=task).units[0], torch.full((size,), 50))
    assert many - few < bound < twin


@pytest.mark.long
def test_the_benchmark_prints_what_a_task_costs(ray_cluster, tmp_path, capsys):
    results = benchmark.main(str(tmp_path), groups="scheduling", quick=True)
    for kind in ("shard", "chunk"):
        value = results[f"scheduling_ms_per_{kind}"]
        assert 0 < value["min"] <= value["median"] <= value["max"]
        assert f"`scheduling_ms_per_{kind}`" in (tmp_path / "results.md").read_text()
    assert "ms a shard" in capsys.readouterr().out
