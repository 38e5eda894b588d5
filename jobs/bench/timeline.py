"""Wall time of a stage, and the rate at which its work went once all workers were at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class Timeline:
    """Wall time of a stage, and its progress, which shows the rate once all workers are at work."""

    start: float
    end: float
    events: list[tuple[float, int]]

    @classmethod
    def of(cls, stage: Callable[[Progress], object]) -> Timeline:
        events: list[tuple[float, int]] = []
        start = time.monotonic()
        stage(lambda done, total: events.append((time.monotonic(), done)))
        return cls(
            start=start,
            end=time.monotonic(),
            events=events,
        )

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def rate(self, first: int) -> float | None:
        """Units per second from the moment ``first`` were done.

        None where progress was too coarse to tell.
        """
        last = max(done for _, done in self.events)
        begin = next(((t, done) for t, done in self.events if first <= done < last), None)
        finish = next(t for t, done in self.events if done == last)
        if begin is None or finish <= begin[0]:
            return None
        return (last - begin[1]) / (finish - begin[0])
