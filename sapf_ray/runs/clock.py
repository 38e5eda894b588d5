"""The clock of a run: time, orchestration and peak memory of its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapf_ray.runs import runlog, worktime
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.memory import Peak, peak_memory

_MEMORY = ("peak_memory_mb", "peak_gpu_memory_mb")


class Clock:
    """Time, orchestration and peak memory of stages.

    Times add up over the starts of a run, as far as these ended the stage; files in the run
    directory carry them from one start to the next.

    Args:
        run: The run directory.
        since: ``time.time()`` at which this start of the run began; now unless given.

    Attributes:
        seconds: Wall time of each stage.
        orchestration: The part of it in which nobody was at work.
        memory: Per kind of memory, the peak of each stage in MB.
    """

    def __init__(self, run: RunDirectory, since: float | None = None) -> None:
        self.run = run
        self.since = time.time() if since is None else since
        self.seconds: dict[str, float] = _earlier(run.timings, {})
        self.orchestration: dict[str, float] = _earlier(run.orchestration, {})
        self.memory: dict[str, dict[str, float]] = _earlier(
            run.memory, {kind: {} for kind in _MEMORY}
        )
        self._inside = 0.0  # seconds of this start in stages

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block is the stage ``name``."""
        started = time.monotonic()
        begun = time.time()
        with runlog.stage_events(name):
            with peak_memory() as peak, worktime.collecting() as worked:
                yield
            compute = worktime.covered(worked, begun, end=time.time())
            self._ended(name, time.monotonic() - started, compute=compute, peak=peak)

    def _ended(self, name: str, seconds: float, *, compute: float, peak: Peak) -> None:
        idle = max(0.0, seconds - compute)
        self._inside += seconds
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        self.orchestration[name] = round(self.orchestration.get(name, 0.0) + idle, 2)
        runlog.event("stage_ended", seconds=round(seconds, 2), orchestration=round(idle, 2))
        for kind, value in zip(_MEMORY, (peak.main, peak.gpu), strict=True):
            if value:
                before = self.memory[kind].get(name, 0.0)
                self.memory[kind][name] = max(before, round(value, 1))
        self.run.write_json(self.run.timings, self.seconds)
        self.run.write_json(self.run.orchestration, self.orchestration)
        self.run.write_json(self.run.memory, self.memory)

    def cost(self) -> dict[str, float]:
        """Orchestration up to now, as :mod:`sapf_ray.runs.worktime` defines it.

        Returns:
            Seconds of each stage; ``outside_stages``, seconds of this start in which no stage was
            under way (the driver's imports, checks, Ray's start and end, epsilon, MLflow);
            ``total_share`` of all of them in the run's wall time, in [0, 1]. Of earlier starts only
            the stages that they finished count.
        """
        outside = max(0.0, time.time() - self.since - self._inside)
        inside = sum(self.seconds.get(name, 0.0) for name in self.orchestration)
        idle = sum(self.orchestration.values()) + outside
        return {
            **self.orchestration,
            "outside_stages": round(outside, 2),
            "total_share": round(idle / max(inside + outside, 1e-9), 4),
        }


def _earlier(path: Path, default: Any) -> Any:
    """What an earlier start of the run left in a JSON file."""
    return RunDirectory.read_json(path) if path.exists() else default


def finished_stages(out: str) -> list[str]:
    """Stages that earlier starts of the run in directory ``out`` ended."""
    return list(_earlier(RunDirectory(out).timings, {}))
