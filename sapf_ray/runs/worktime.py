"""Orchestration cost: the part of a stage's wall time in which nobody was at work.

**Compute** is the wall time during which at least one process of the stage is inside its real work:

* a Ray task or actor: from the call, with its arguments at hand, to the return. Loading the model's
  weights is work (a script without Ray loads them too), and so are reading a shard and writing
  results;
* the train workers: from loading the model to the last step, exchange of gradients and writing of
  checkpoints included, ``ray.train.report`` not. Rank 0 speaks for all, for the ranks take their
  steps together;
* the driver: what it does itself for the result (prompt embeddings, the adapter's file, the
  picture).

**Orchestration** is all the rest: starting processes, their imports, Ray Train's controller,
queueing, moving and gathering results, reports. What a killed worker did before its work was
repeated counts there too: its times are lost with it. So a stage without faults shows what Ray
costs, and one with faults shows what these cost as well.

Work at the same time counts once: two workers busy for the same ten seconds are ten seconds of
compute, and a second worker that idles is not seen here (``synthesis_idle_share`` shows it).
Libraries that a loading function imports by itself, as transformers does for its models, cannot be
distinguished from loading and count as compute. Times are ``time.time()`` of the machine that does
the work: on a cluster the figure is as good as its NTP.

Only sums over a stage leave the driver: the times of single shards or steps would reveal the size
of Poisson batches (design rule 6).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

Interval = tuple[float, float]  # time.time() at begin and end
_P = ParamSpec("_P")
_collected: ContextVar[list[Interval] | None] = ContextVar("collected", default=None)


class Worked(NamedTuple):
    """What a task returned, as it travels to :func:`sapf_ray.cluster.result`.

    Attributes:
        attempt: 0, or how often Ray had to start the task again.
    """

    value: Any
    interval: Interval
    attempt: int


def timed(function: Callable[_P, Any]) -> Callable[_P, Worked]:
    """Makes a Ray task or actor method return :class:`Worked`; goes below ``ray.remote``."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **options: _P.kwargs) -> Worked:
        start = time.time()
        value = function(*arguments, **options)
        return Worked(value, (start, time.time()), _attempt())

    return call


def _attempt() -> int:
    """How often Ray had to start this task again; 0 outside of Ray's workers.

    No public interface of Ray reports it inside the task, so a Ray that moved it counts none.
    """
    with suppress(ImportError, AttributeError):
        from ray._private.worker import WORKER_MODE, global_worker

        worker: Any = global_worker
        if worker.mode == WORKER_MODE:
            return int(worker.core_worker.get_current_task_attempt_number())
    return 0


class Laps:
    """Work of one train worker, from now on, without its pauses."""

    def __init__(self) -> None:
        self._done: list[Interval] = []
        self._begun = time.time()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The block waits for Ray."""
        self._done.append((self._begun, time.time()))
        yield
        self._begun = time.time()

    def end(self) -> list[Interval]:
        return [*self._done, (self._begun, time.time())]


@contextmanager
def collecting() -> Iterator[list[Interval]]:
    """Yields a list that fills with the work done in the block."""
    intervals: list[Interval] = []
    token = _collected.set(intervals)
    try:
        yield intervals
    finally:
        _collected.reset(token)


def add(intervals: Iterable[Interval]) -> None:
    """Work done elsewhere, to the stage that is under way, if any."""
    collected = _collected.get()
    if collected is not None:
        collected.extend((float(start), float(end)) for start, end in intervals)


@contextmanager
def working() -> Iterator[None]:
    """The block is work of the driver itself; also as a decorator."""
    start = time.time()
    try:
        yield
    finally:
        add([(start, time.time())])


def covered(
    intervals: Iterable[Interval],
    start: float,
    *,
    end: float,
) -> float:
    """Seconds of [start, end] that lie in at least one interval."""
    total = 0.0
    reached = start
    for begin, finish in sorted(intervals):
        begin = max(begin, reached)
        finish = min(finish, end)
        if finish > begin:
            total += finish - begin
            reached = finish
    return total


def process_start() -> float:
    """``time.time()`` at which this process began; now, where the system lacks /proc."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds since the machine's start
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        return time.time() - max(0.0, age)
    return time.time()
