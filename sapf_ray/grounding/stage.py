"""The stage ``grounding``: what the run's remedies find out, in ``grounding.json``."""

from __future__ import annotations

from typing import Any

from sapf_ray.files import write_json
from sapf_ray.grounding.remedies import REMEDIES
from sapf_ray.runs.context import RunContext


def ground(run: RunContext) -> None:
    """Runs the remedies that have a part here, in the table's order.

    The file is what they release: all in it is paid for by the ledger, or public. It appears once
    all are done; a start in between repeats their releases, free replays.
    """
    found: dict[str, Any] = {"remedies": list(run.plan.remedies)}
    for name in run.plan.remedies:
        make = REMEDIES[name].ground
        if make is not None:
            found |= make(run)
    write_json(run.directory.grounding, found)


def found(run: RunContext) -> dict[str, Any]:
    """What the stage left; empty where it had no part."""
    path = run.directory.grounding
    return run.directory.read_json(path) if path.exists() else {}


def is_needed(run: RunContext) -> bool:
    """Whether one of the run's remedies has a part in the stage."""
    return any(REMEDIES[name].ground is not None for name in run.plan.remedies)


def is_done(run: RunContext) -> bool:
    """Whether an earlier start finished it."""
    return run.directory.grounding.exists()
