"""The command ``sapf audit``: makes the run where there is none, audits it, prints the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sapf_ray.audit.run import audit_directory, config_of_audit
from sapf_ray.config import RunConfig
from sapf_ray.errors import SapfError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        run: Directory of a finished run; None makes one in ``out``.
        out: Run directory to make.
        config: Of the run to make.
        given: Config keys of the command line, with their values.
        wanted: Config keys that the user set anywhere.
        as_json: Prints one JSON object in place of a table.
    """

    run: str | None
    out: str | None
    config: RunConfig | None
    given: Mapping[str, Any]
    wanted: set[str]
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Show:
    """How a command shows what it does; from above this package.

    Attributes:
        progress: A console to a context that yields the callback of stages.
        note: Takes a console, a line, and whether it is for a terminal alone.
    """

    progress: Callable[[Console], AbstractContextManager[Callable[[str, int, int], None]]]
    note: Callable[..., None]


def audit(request: Request, console: Console, *, show: Show) -> int:
    """Runs the command.

    Args:
        request: What was asked for.
        console: Where the table goes; with JSON, progress goes to stderr.
        show: How progress and notes are shown.

    Returns:
        The exit code: 1 where an audit found the claim false.

    Raises:
        SapfError: Neither a run nor a place for one, or what either cannot be audited for.
    """
    notes = Console(stderr=True) if request.as_json else console
    if request.run is None:
        _make(request, notes, show=show)
    report = audit_directory(
        request.run or request.out or "",
        given=request.given,
        on_audit=lambda name: _say(notes, f"audit: {name}"),
    )
    if request.as_json:
        print(report.to_json())
    else:
        console.print(report.table())
        _say(console, report.verdict)
    return int(bool(report.falsified))


def _make(request: Request, console: Console, *, show: Show) -> None:
    if request.out is None or request.config is None:
        raise SapfError("audit: wants a run directory, or --out DIRECTORY of a run to make")
    config = config_of_audit(request.config, request.wanted)

    from sapf_ray.pipeline import run
    from sapf_ray.runs import worktime

    with show.progress(console) as on_progress:
        run(
            config,
            request.out,
            on_progress=on_progress,
            on_note=lambda line, secret: show.note(console, line, secret=secret),
            since=worktime.process_start(),
        )


def _say(console: Console, line: str) -> None:
    console.print(f"sapf: {line}", markup=False, highlight=False, soft_wrap=True)
