"""``run.log.jsonl``: what happened to a run, one JSON object a line, appended by every start.

A line has ``time`` (UTC), ``level``, ``run`` (random, the same over all starts of a run directory),
``stage`` (null outside of stages), ``event``, and the event's own fields:

=================== ======= =====================================================================
event               level   fields
=================== ======= =====================================================================
run_started         info
run_resumed         info
run_ended           info    seconds, orchestration (its share of them)
run_interrupted     error   (ctrl-C)
run_failed          error   error
stage_started       info
stage_resumed       info    step, or images (done by an earlier start)
stage_ended         info    seconds, orchestration
stage_failed        error   error
task_retried        warning attempt (a shard whose worker was lost: Ray did it again)
work_lost           error   error (repeating did not help)
workers_lost        warning ranks, error, restart, of (Ray Train starts the group again while
                            restart <= of)
nodes_lost          error
checkpoint_skipped  warning checkpoint (torn)
snapshot_removed    warning (Ray Train's, torn)
tracking_lost       warning error
words_unknown       warning remedies (class words that the model does not know)
fingerprint_changed warning parts (other noise, charged again)
release_changed     warning release (the same, of another exact sum)
=================== ======= =====================================================================

``error`` is the name of a class: messages may name a user's files. Nothing else that depends on
single records is here either, no counts of shards, steps or batches with their times (design rule
6). The log stays in the run directory; it is neither published nor sent to MLflow.

Events go through the standard library's logging, so that any handler on the logger
``sapf_ray.runs.runlog`` gets them as well.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

WARNING = logging.WARNING
ERROR = logging.ERROR
Field = str | int | float | list[int]

_LOGGER = logging.getLogger(__name__)
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False  # what the user must know is said elsewhere, in words


@dataclass(frozen=True, kw_only=True)
class Place:
    """A run's log: its file, the run's id, and the stage that is under way."""

    path: str
    run: str
    stage: str | None = None


_place: ContextVar[Place | None] = ContextVar("place", default=None)
_stage: ContextVar[str | None] = ContextVar("stage", default=None)


class JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        own = vars(record)
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "run": own["run"],
            "stage": own["stage"],
            "event": record.getMessage(),
            **own["fields"],
        }
        return json.dumps(line, ensure_ascii=False)


class _Append(logging.Handler):
    """Opens the file for each of the few lines.

    So nothing is lost with the process, and other processes can write there as well.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.setFormatter(JsonLine())

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk costs the line, not the run
            with open(self.path, "a+b") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read(1) not in (b"", b"\n")
                line = self.format(record).encode() + b"\n"
                file.write(b"\n" + line if torn else line)


@contextmanager
def recording(place: Place) -> Iterator[None]:
    """Events of the block go to the log at ``place``."""
    handler = _Append(place.path)
    token = _place.set(place)
    stage = _stage.set(place.stage)
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _place.reset(token)
        _stage.reset(stage)


@contextmanager
def shown() -> Iterator[None]:
    """Events of the block go to stderr as well."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine())
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)


@contextmanager
def start_of_run(place: Place, resumed: bool) -> Iterator[None]:
    """The block is one start of a run: its begin, its events, its failure."""
    with recording(place):
        event("run_resumed" if resumed else "run_started")
        try:
            yield
        except KeyboardInterrupt:
            event("run_interrupted", ERROR)
            raise
        except BaseException as error:
            event("run_failed", ERROR, error=type(error).__name__)
            raise


@contextmanager
def stage_events(name: str) -> Iterator[None]:
    """The block is a stage: events in it carry its name."""
    token = _stage.set(name)
    event("stage_started")
    try:
        yield
    except BaseException as error:
        event("stage_failed", ERROR, error=type(error).__name__)
        raise
    finally:
        _stage.reset(token)


def event(
    name: str,
    level: int = logging.INFO,
    /,
    **fields: Field,
) -> None:
    """One line of the log; nothing where no run is recorded."""
    place = _place.get()
    if place is None:
        return
    extra = {"run": place.run, "stage": _stage.get(), "fields": fields}
    _LOGGER.log(level, name, extra=extra)


def release_changed(name: str) -> None:
    """Logs that a release was made again of another exact sum."""
    event("release_changed", WARNING, release=name)


def here() -> Place | None:
    """Where events go at this moment.

    With it, :func:`recording` goes on with them in another process of the machine.
    """
    place = _place.get()
    if place is None:
        return None
    return replace(place, stage=_stage.get())


def last_stage(log: Path) -> str | None:
    """The stage that the log says was begun last; None before the first, or without a log."""
    with suppress(OSError):
        for line in reversed(log.read_text(encoding="utf-8").splitlines()):
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == "stage_started":
                    return str(entry["stage"])
    return None
