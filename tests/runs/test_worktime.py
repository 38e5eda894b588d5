"""What counts as work, and that it reaches the stage that the work was for."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest

from sapf_ray.errors import DataError
from sapf_ray.runs import worktime
from sapf_ray.runs.clock import Clock
from sapf_ray.runs.directory import RunDirectory


def test_overlap_counts_once_and_only_inside_the_stage():
    assert worktime.covered([], 0, end=10) == 0
    assert worktime.covered([(1, 3), (2, 4), (2.5, 2.75), (6, 7)], 0, end=10) == 4
    assert worktime.covered([(-5, 1), (9, 20), (30, 40), (-9, -8)], 0, end=10) == 2
    generator = np.random.default_rng(0)
    for _ in range(20):  # against a count of milliseconds
        intervals = np.sort(generator.integers(-200, 1200, (generator.integers(1, 9), 2)), axis=1)
        busy = np.zeros(1000, bool)
        for start, end in intervals.clip(0, 1000):
            busy[start:end] = True
        assert (
            worktime.covered([(float(a), float(b)) for a, b in intervals], 0, end=1000)
            == busy.sum()
        )


def test_a_pause_is_no_work():
    laps = worktime.Laps()
    with laps.pause():
        paused = time.time()
        time.sleep(0.02)
    (first, second) = laps.end()
    assert first[0] <= first[1] <= paused <= paused + 0.02 <= second[0] <= second[1]


def test_a_process_knows_its_start():
    assert worktime.process_start() == pytest.approx(psutil.Process().create_time(), abs=2)


def test_a_tasks_work_reaches_its_stage_and_waiting_for_it_does_not(ray_cluster, tmp_path):
    import ray

    from sapf_ray import cluster

    @ray.remote
    @worktime.timed
    def work(seconds: float) -> str:
        """Docstring."""
        time.sleep(seconds)
        return "done"

    @ray.remote
    @worktime.timed
    def fail() -> None:
        raise DataError("broken")

    assert cluster.result(work.remote(0)) == "done"  # outside of a stage: nothing to tell
    stage = Clock(run=RunDirectory(tmp_path))
    with stage("selection"):
        references = [work.remote(0.3), work.remote(0.3)]
        ray.wait(references, num_returns=2)
        time.sleep(0.5)  # results wait for the driver: orchestration
        assert [cluster.result(reference) for reference in references] == ["done", "done"]
        with pytest.raises(DataError, match="broken"):
            cluster.result(fail.remote())
    with stage("pictures"), worktime.working():
        time.sleep(0.1)
    seconds = stage.seconds
    lost = stage.orchestration
    assert seconds["selection"] - lost["selection"] >= 0.29 and lost["selection"] >= 0.49
    assert seconds["pictures"] - lost["pictures"] >= 0.09

    again = Clock(
        run=RunDirectory(tmp_path), since=time.time() - 5
    )  # another start, which skips both
    cost = again.cost()
    assert {name: cost[name] for name in lost} == lost
    assert cost["outside_stages"] >= 5
    total = sum(lost.values()) + cost["outside_stages"]
    assert cost["total_share"] == pytest.approx(
        total / (sum(seconds.values()) + cost["outside_stages"]), abs=1e-3
    )
