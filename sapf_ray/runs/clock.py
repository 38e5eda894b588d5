"""The clock of a run: time, orchestration and peak memory of its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from sapf_ray.runs import runlog, worktime
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.memory import Peak, peak_memory


@dataclass(kw_only=True)
class Clock:
    """Time, orchestration and peak memory of stages. Times add up over the starts of a run, as far
    as these ended the stage.

    Args:
        since: ``time.time()`` at which this start of the run began.
    """

    run: RunDirectory
    since: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)
    orchestration: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"peak_memory_mb": {}, "peak_gpu_memory_mb": {}}
    )

    def __post_init__(self) -> None:
        self._inside = 0.0  # seconds of this start in stages
        if self.run.timings.exists():
            self.seconds = self.run.read_json(self.run.timings)
        if self.run.orchestration.exists():
            self.orchestration = self.run.read_json(self.run.orchestration)
        if self.run.memory.exists():
            self.memory = self.run.read_json(self.run.memory)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, begun = time.monotonic(), time.time()
        with runlog.stage_events(name):
            with peak_memory() as peak, worktime.collecting() as worked:
                yield
            self._done(
                name,
                time.monotonic() - start,
                worktime.covered(worked, begun, end=time.time()),
                peak,
            )

    def _done(self, name: str, seconds: float, compute: float, peak: Peak) -> None:
        self._inside += seconds
        idle = max(0.0, seconds - compute)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        self.orchestration[name] = round(self.orchestration.get(name, 0.0) + idle, 2)
        runlog.event("stage_ended", seconds=round(seconds, 2), orchestration=round(idle, 2))
        self.run.write_json(self.run.timings, self.seconds)
        self.run.write_json(self.run.orchestration, self.orchestration)
        for key, value in (("peak_memory_mb", peak.main), ("peak_gpu_memory_mb", peak.gpu)):
            if value:
                self.memory[key][name] = max(self.memory[key].get(name, 0.0), round(value, 1))
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
        known = [self.seconds.get(name, 0.0) for name in self.orchestration]
        share = (sum(self.orchestration.values()) + outside) / max(sum(known) + outside, 1e-9)
        return {
            **self.orchestration,
            "outside_stages": round(outside, 2),
            "total_share": round(share, 4),
        }
