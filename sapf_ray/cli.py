"""The ``sapf`` command: parse, call, print. No logic of its own.

Options are those of :mod:`sapf_ray.options`. What a command needs is imported inside its function:
``sapf --help`` and the listings load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from sapf_ray import plain_text
from sapf_ray.errors import ConfigError, SapfError, is_environments, remedy
from sapf_ray.options import all_given_keys, config_of, given_keys, make_parser, parse

if TYPE_CHECKING:
    from sapf_ray.data.base import ImageSource
    from sapf_ray.models.public_model import PublicModel
    from sapf_ray.pipeline import Result
    from sapf_ray.privacy.planner import PrivacyPlan
    from sapf_ray.tune.grid import Grid


def _run(namespace: argparse.Namespace, console: Console) -> None:
    config = config_of(namespace)
    from sapf_ray.pipeline import run
    from sapf_ray.report.sizing import opening_lines
    from sapf_ray.report.terminal import result_table, show_progress
    from sapf_ray.reuse.commands import asks_for_more, make_more
    from sapf_ray.runs import runlog, worktime

    def on_plan(plan: PrivacyPlan, source: ImageSource, model: PublicModel) -> None:
        for line in opening_lines(config, namespace.out, plan=plan, source=source, model=model):
            _say(console, line)

    make: Callable[..., Result] = functools.partial(run, on_plan=on_plan)
    if asks_for_more(config, namespace.out):
        make = make_more
    with (
        runlog.shown() if namespace.verbose else contextlib.nullcontext(),
        show_progress(console) as on_progress,
    ):
        result = make(
            config,
            namespace.out,
            on_progress=on_progress,
            on_note=lambda line, secret: _note(console, line, secret=secret),
            since=worktime.process_start(),
        )
    console.print(result_table(result))


def _synthesize(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.reuse.commands import synthesize

    _later(synthesize, namespace, console)


def _evaluate(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.reuse.commands import evaluate
    from sapf_ray.reuse.images import UNKNOWN, evaluate_images, is_plain

    if not is_plain(namespace.directory):
        _later(evaluate, namespace, console)
        return
    scores = evaluate_images(namespace.directory, given_keys(namespace))
    if namespace.json:
        print(json.dumps(scores))
        return
    from sapf_ray.report.terminal import score_table

    _note(console, UNKNOWN, secret=False)
    console.print(score_table(f"sapf evaluate {namespace.directory}", scores))


def _later(command: Callable[..., Result], namespace: argparse.Namespace, console: Console) -> None:
    """A command on a finished run."""
    from sapf_ray.report.terminal import result_table, show_progress
    from sapf_ray.runs import runlog, worktime

    as_json = vars(namespace).get("json", False)
    notes = Console(stderr=True) if as_json else console
    with (
        runlog.shown() if namespace.verbose else contextlib.nullcontext(),
        show_progress(notes) as on_progress,
    ):
        result = command(
            namespace.directory,
            given_keys(namespace),
            name=namespace.name,
            on_progress=on_progress,
            on_note=lambda line, secret: _note(notes, line, secret=secret),
            since=worktime.process_start(),
        )
    if as_json:
        print(json.dumps(result.metrics))
    else:
        console.print(result_table(result))


def _note(console: Console, line: str, *, secret: bool) -> None:
    """A line about the data; what tells of single records is shown on a terminal, never logged."""
    if console.is_terminal or not secret:
        _say(console, f"note: {line}")


def _say(console: Console, line: str) -> None:
    console.print(f"sapf: {line}", markup=False, highlight=False, soft_wrap=True)


def _init(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.first_config import write_first_config

    made = write_first_config(
        namespace.path,
        namespace.out,
        force=namespace.force,
        minutes=namespace.minutes,
        given=given_keys(namespace),
    )
    for line in made:
        _say(console, line)


def _doctor(namespace: argparse.Namespace, console: Console) -> int:
    import dataclasses
    from pathlib import Path

    from sapf_ray.doctor import Subject, examine

    given = given_keys(namespace)
    if namespace.path is not None:
        from sapf_ray.first_config import data_keys

        namespace = argparse.Namespace(**{**data_keys(namespace.path), **vars(namespace)})
    subject = Subject(
        config=config_of(namespace),
        out=Path(namespace.out),
        has_data=bool(namespace.path or namespace.config or "data.source" in given),
    )
    findings = []
    for finding in examine(subject):
        findings.append(finding)
        if not namespace.json:
            line = finding.line()
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if namespace.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return int(any(finding.state == "FAULT" for finding in findings))


def _plan(namespace: argparse.Namespace, console: Console) -> None:
    config = config_of(namespace)
    from sapf_ray.data.base import open_source
    from sapf_ray.estimate.cluster import estimate_run, open_cluster
    from sapf_ray.models.facts import find_facts
    from sapf_ray.privacy.planner import make_plan
    from sapf_ray.report.tables import estimate_table, person_line, plan_table

    cluster = open_cluster(
        namespace.cluster_devices,
        config,
        costs_file=namespace.cluster_costs,
        price=namespace.cluster_price,
    )
    found = None
    n_records = config.data.n_records
    try:
        source = open_source(config.data)
        n_records = n_records or source.n_units
        found = find_facts(config, source)
    except SapfError:
        if n_records is None:
            raise
    plan = make_plan(config, n_records, facts=None if found is None else found.facts)
    times = None if cluster is None else estimate_run(config, plan, cluster=cluster)
    person = {}
    if namespace.images_per_person is not None:
        from sapf_ray.privacy.group_privacy import person_report

        person = person_report(plan, namespace.images_per_person)
    if namespace.json:
        found_times = {} if times is None else {"cluster": times.to_dict()}
        print(json.dumps(plan.to_dict() | found_times | person))
    else:
        warning = None if found is None else found.words.line(plan.remedies)
        if warning is not None:
            _note(console, warning, secret=False)
        console.print(plan_table(plan))
        if person:
            console.print(person_line(person["person"]))
        if times is not None:
            console.print(estimate_table(times))


def _ledger(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.report.tables import ledger_table
    from sapf_ray.runs.directory import RunDirectory

    console.print(ledger_table(Ledger.open(RunDirectory(namespace.directory).ledger)))


def _audit(namespace: argparse.Namespace, console: Console) -> int:
    from sapf_ray.audit.command import Request, Show, audit
    from sapf_ray.report.terminal import show_progress

    request = Request(
        run=namespace.directory,
        out=namespace.out,
        config=None if namespace.directory else config_of(namespace),
        given=given_keys(namespace),
        wanted=all_given_keys(namespace),
        as_json=namespace.json,
    )
    return audit(request, console, show=Show(progress=show_progress, note=_note))


def _open_grid(name: str, namespace: argparse.Namespace) -> Grid:
    from sapf_ray.tune.grid import open_grid

    for option in ("max_concurrent", "retries"):
        value = getattr(namespace, option)
        if value < 0:
            raise ConfigError(f"--{option}", value, "must be at least 0")
    return open_grid(
        name,
        namespace.out,
        smoke=namespace.smoke,
        overrides=given_keys(namespace),
        only=_labels(namespace.only),
        strict=not namespace.dry_run,
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


def _tune(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.tune.grid import dry_run_table, raise_failures, run_grid

    grid = _open_grid(namespace.space, namespace)
    if namespace.dry_run:
        console.print(dry_run_table(grid))
        return
    report, outcome = run_grid(
        grid, console, max_concurrent=namespace.max_concurrent or None, retries=namespace.retries
    )
    console.print(report)
    raise_failures(outcome)


def _reproduce(namespace: argparse.Namespace, console: Console) -> None:
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


def _submit(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.submit import submit

    words = namespace.words
    submit(
        words[1:] if words[:1] == ["--"] else words,
        address=namespace.address,
        install=namespace.install,
        modules=namespace.modules,
    )


def _list(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.report.tables import LISTS

    rows, table = LISTS[namespace.command]
    if namespace.json:
        print(json.dumps(rows(), indent=2))
    else:
        console.print(table())


INTERRUPTED = 130  # exit code, as shells have it

_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int | None]] = {
    "init": _init,
    "doctor": _doctor,
    "run": _run,
    "plan": _plan,
    "synthesize": _synthesize,
    "evaluate": _evaluate,
    "ledger": _ledger,
    "audit": _audit,
    "tune": _tune,
    "reproduce": _reproduce,
    "submit": _submit,
    "datasets": _list,
    "methods": _list,
    "models": _list,
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit code: 0 done, 1 faults found by ``doctor`` or a false claim by ``audit``, 2 bad
            input, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    plain_text.use()
    # else a thread that outlives ctrl-C starts Ray again
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not arguments:
        make_parser("").print_help()
        return 2
    try:
        namespace = parse(arguments)
        return _COMMANDS[namespace.command](namespace, Console()) or 0
    except SapfError as error:
        sys.stderr.write(f"sapf: error: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        command_line = shlex.join(["sapf", *arguments])
        sys.stderr.write(
            f"\nsapf: interrupted; nothing is lost. The same command continues: {command_line}\n"
        )
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if not is_environments(error):
            raise
        sys.stderr.write(f"sapf: error: {_one_line(error)}; {remedy(error)}\n")
        return 2
    return 0


def entry() -> NoReturn:
    """The ``sapf`` command: :func:`main`, as a process of its own."""
    code = main()
    if code == INTERRUPTED:
        # A thread of an interrupted stage may still be inside Ray's native code, which can crash
        # while Python tears Ray down. What Ray started here ends with this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
