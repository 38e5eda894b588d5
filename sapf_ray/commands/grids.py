"""Grids: ``sapf tune`` and ``sapf reproduce``."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from rich.console import Console

from sapf_ray.commands.say import say
from sapf_ray.errors import ConfigError
from sapf_ray.options import given_keys

if TYPE_CHECKING:
    from sapf_ray.tune.grid import Grid


def _open_grid(name: str, namespace: argparse.Namespace) -> Grid:
    from sapf_ray.tune.grid import open_grid

    for option in ("max_concurrent", "retries"):
        value = getattr(namespace, option)
        if value < 0:
            raise ConfigError(f"--{option}", value, "must be at least 0")
    make_twin = None
    if getattr(namespace, "public_twin", False) and not namespace.dry_run:
        from sapf_ray import pipeline

        make_twin = pipeline.run
    return open_grid(
        name,
        namespace.out,
        smoke=namespace.smoke,
        overrides=given_keys(namespace),
        only=_labels(namespace.only),
        strict=not namespace.dry_run,
        make_twin=make_twin,
    )


def _labels(text: str | None) -> dict[str, str]:
    """``AXIS=LABEL,AXIS=LABEL`` of ``--only``; a label may hold a comma."""
    labels = {}
    for part in re.split(r",\s*(?=[\w.]+=)", text) if text else []:
        axis, equals, label = part.partition("=")
        if not equals:
            raise ConfigError("--only", text, "must be AXIS=LABEL, or several separated by commas")
        labels[axis.strip()] = label.strip()
    return labels


def tune(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.tune.grid import dry_run_table, raise_failures, run_grid

    if namespace.private:
        _tune_privately(namespace, console)
        return
    grid = _open_grid(namespace.space, namespace)
    if namespace.dry_run:
        console.print(dry_run_table(grid))
        return
    report, outcome = run_grid(
        grid, console, max_concurrent=namespace.max_concurrent or None, retries=namespace.retries
    )
    console.print(report)
    raise_failures(outcome)


def _tune_privately(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.tune.private_plan import check_options, open_choice, plan_lines

    check_options(
        public_twin=namespace.public_twin,
        max_concurrent=namespace.max_concurrent,
        retries=namespace.retries,
    )
    choice = open_choice(
        namespace.space,
        namespace.out,
        smoke=namespace.smoke,
        overrides=given_keys(namespace),
        only=_labels(namespace.only),
        strict=not namespace.dry_run,
    )
    for line in plan_lines(choice):
        say(console, line)
    if namespace.dry_run:
        return
    from sapf_ray.tune.private import result_lines, run_choice

    for line in result_lines(
        run_choice(choice, say=lambda text: say(console, text), retries=namespace.retries)
    ):
        say(console, line)


def reproduce(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.paper.accounting_reports import TABLES, reproduce_accounting
    from sapf_ray.paper.grids import check_name, paper_report, write_plots
    from sapf_ray.tune.grid import dry_run_table, raise_failures, run_grid

    check_name(namespace.table)
    outcome = None
    if namespace.table in TABLES:
        report = reproduce_accounting(namespace.table)
    else:
        grid = _open_grid(namespace.table, namespace)
        if namespace.dry_run:
            console.print(dry_run_table(grid))
            return
        progress = console if namespace.format == "text" else Console(stderr=True)
        _, outcome = run_grid(
            grid,
            progress,
            max_concurrent=namespace.max_concurrent or None,
            retries=namespace.retries,
        )
        report = paper_report(namespace.table, grid, failed=outcome.failed)
        for path in write_plots(namespace.table, report, grid=grid):
            progress.print(str(path))
    if namespace.format == "text":
        console.print(report)
    else:
        print(report.render(namespace.format), end="")
    if outcome is not None:
        raise_failures(outcome)
