"""The ``sapf`` command: parse, call, print. No logic of its own.

Every option is a key of :mod:`sapf_ray.config`; YAML files and dotted flags use the same names. A
later source wins: defaults, ``--preset``, ``--config``, flags.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jsonargparse
from rich.console import Console
from rich.table import Table

from sapf_ray.config import RunConfig, flatten, from_dict, to_dict
from sapf_ray.errors import SapfError
from sapf_ray.presets import preset_path, presets

if TYPE_CHECKING:
    from sapf_ray.tune.grid import Grid

_FORMATS = Literal["text", "markdown", "csv", "latex"]


class _Parser(jsonargparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        sys.stderr.write("sapf: error: " + _explain(_one_line(message)) + "\n")
        sys.exit(2)


def _one_line(message: str) -> str:
    return " ".join(line.strip() for line in str(message).strip().splitlines() if line.strip())


def _explain(message: str) -> str:
    """jsonargparse's words, with the field, the value and what is allowed; unknown options get a
    suggestion.
    """
    wrong_type = re.search(
        r'Parser key "([\w.]+)".*Expected a <class \'(\w+)\'>\. Got value: (.*)', message
    )
    if wrong_type:
        field, kind, value = wrong_type.groups()
        return f"{field} = {value!r}: must be a value of type {kind}"
    not_listed = re.search(
        r'Parser key "([\w.]+)".*Expected a typing\.Literal\[(.*)\]\. Got value: (.*)', message
    )
    if not_listed:
        field, choices, value = not_listed.groups()
        return f"{field} = {value!r}: must be one of {choices}"
    unknown = re.search(
        r"unrecognized arguments: --([^\s=]+)|does not accept option '([\w.]+)'", message
    )
    if unknown is None:
        return message.replace("required: run.out", "required: --out")
    name = unknown.group(1) or unknown.group(2)
    keys = list(flatten(to_dict(RunConfig())))
    known = ["config", "preset", "out", "json", *keys]
    close = difflib.get_close_matches(name, known, n=1)
    section = [key for key in keys if key.startswith(name.split(".")[0] + ".")]
    allowed = section or [
        "config",
        "preset",
        "out",
        *dict.fromkeys(k.split(".")[0] + ".*" * ("." in k) for k in keys),
    ]
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{name}: unknown key; {hint}allowed: {', '.join(allowed)}"


def _config_parser(description: str) -> _Parser:
    parser = _Parser(description=description, env_prefix="SAPF", exit_on_error=True)
    parser.add_argument(
        "--config", action="config", help="YAML file with the keys below; flags override it."
    )
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


def _add_grid_options(parser: _Parser) -> None:
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="Directory of the runs, runs/NAME unless given; the same command "
        "again continues it, and keeps what is finished.",
    )
    parser.add_argument(
        "--smoke",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="The small twin on embedded data.",
    )
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="List cells, budgets and times; start nothing.",
    )
    parser.add_argument(
        "--resume", type=bool, default=True, nargs="?", const=True, help="A grid always continues."
    )
    parser.add_argument(
        "--max_concurrent",
        "--max-concurrent",
        type=int,
        default=0,
        help="Cells at the same time; 0: as many as the cluster holds.",
    )
    parser.add_argument("--retries", type=int, default=2, help="Of a cell whose run broke off.")
    parser.add_argument(
        "--only",
        type=str,
        default=None,
        help="Cells with these labels, e.g. method=DP-SAPF,seed=0.",
    )
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)


def _parser() -> _Parser:
    parser = _Parser(prog="sapf", description="Differentially private image synthesis on Ray.")
    commands = parser.add_subcommands(dest="command")
    run = _config_parser("Run or continue one experiment.")
    run.add_argument(
        "--out", type=str, required=True, help="Run directory; the same command again continues it."
    )
    run.add_argument(
        "--verbose",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="Show the lines of run.log.jsonl on stderr as well.",
    )
    plan = _config_parser("Plan the privacy spend; reads no image.")
    plan.add_argument(
        "--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON object."
    )
    plan.add_argument(
        "--cluster_devices",
        type=str,
        default=None,
        metavar="KxDEVICE",
        help="Also estimate time and memory of "
        "each stage on K devices, from measured costs: 4xa6000 (the paper's), 2xcpu2; `--cluster` for short.",
    )
    plan.add_argument(
        "--cluster_costs",
        type=str,
        default=None,
        help="Own measurement for it: results.json of `make bench`, or "
        "metrics.json of a finished run.",
    )
    plan.add_argument(
        "--cluster_price",
        type=float,
        default=None,
        help="Price of a device for an hour: adds costs to it.",
    )
    ledger = _Parser(description="What a run spent, replayed from its ledger.")
    ledger.add_argument("directory", type=str, help="Run directory.")
    for name, sub in (("run", run), ("plan", plan)):
        sub.add_argument(
            "--preset", type=str, default=None, help="Start from a preset: " + ", ".join(presets())
        )
        sub.add_argument(
            "--method", type=str, default=None, help="A row of `sapf methods`; flags override it."
        )
        commands.add_subcommand(name, sub)
    commands.add_subcommand("ledger", ledger)
    tune = _Parser(description="Run or continue a grid of experiments, and print its table.")
    tune.add_argument("space", type=str, help="YAML file, or the name of one in tune_spaces/.")
    reproduce = _Parser(
        description="A table or figure of the paper, ours beside its printed values."
    )
    reproduce.add_argument(
        "table",
        type=str,
        help="table9, table10, table13: computed, reads no image, up to a minute; "
        "table2, 5, 6, 7, 8, 11, 12, 15, figure4, 5, 6, 7: runs or continues the grid.",
    )
    reproduce.add_argument("--format", type=_FORMATS, default="text", help="How to print it.")
    for name, sub in (("tune", tune), ("reproduce", reproduce)):
        _add_grid_options(sub)
        commands.add_subcommand(name, sub)
    data_sets = _Parser(
        description="The data sets that data.source takes, and where to obtain them."
    )
    data_sets.add_argument(
        "--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON list."
    )
    commands.add_subcommand("datasets", data_sets)
    methods = _Parser(description="The methods that --method takes.")
    methods.add_argument(
        "--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON list."
    )
    commands.add_subcommand("methods", methods)
    models = _Parser(
        description="The public models that --model.path takes by name, and where to obtain them."
    )
    models.add_argument(
        "--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON list."
    )
    commands.add_subcommand("models", models)
    return parser


def _option(arguments: list[str], name: str) -> str | None:
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(name + "="):
            value = argument.split("=", 1)[1]
    return value


def _expand(arguments: list[str]) -> list[str]:
    """Puts the preset's file and the method's overrides first, so that every other option overrides
    them.
    """
    arguments = [
        re.sub(r"^--address(?==|$)", "--cluster.address", argument) for argument in arguments
    ]
    if arguments[:1] == ["plan"]:  # the parser has the name already, for the config's section
        arguments = [
            re.sub(r"^--cluster(?==|$)", "--cluster_devices", argument) for argument in arguments
        ]
    first: list[str] = []
    preset, method = _option(arguments, "--preset"), _option(arguments, "--method")
    if preset is not None:
        first += ["--config", preset_path(preset)]
    if method is not None:
        from sapf_ray.methods import find_method

        first += [
            f"--{key}={json.dumps(value).strip(chr(34))}"
            for key, value in find_method(method).overrides.items()
        ]
    return [*arguments[:1], *first, *arguments[1:]]


def _given(arguments: list[str]) -> list[str]:
    """Config keys that the command line sets itself: their defaults must not override a grid's
    file.
    """
    return [
        key for key in flatten(to_dict(RunConfig())) if _option(arguments, f"--{key}") is not None
    ]


def _run_config(namespace: jsonargparse.Namespace, *own: str) -> RunConfig:
    values = namespace.as_dict()
    for name in (*own, "config", "preset", "method"):
        values.pop(name, None)
    return from_dict(values)


def _run(namespace: jsonargparse.Namespace, console: Console) -> None:
    config = _run_config(namespace, "out", "verbose")
    from sapf_ray.pipeline import run  # torch, ray and diffusers load only where they are used
    from sapf_ray.report.terminal import progress_bars, result_table
    from sapf_ray.runs import runlog, worktime

    with (
        runlog.shown() if namespace.verbose else contextlib.nullcontext(),
        progress_bars(console) as on_progress,
    ):
        result = run(config, namespace.out, on_progress, worktime.process_start())
    console.print(result_table(result))


def _plan(namespace: jsonargparse.Namespace, console: Console) -> None:
    config = _run_config(namespace, "json", "cluster_devices", "cluster_costs", "cluster_price")
    from sapf_ray.data.base import open_source
    from sapf_ray.estimate.cluster import estimate, open_cluster
    from sapf_ray.privacy.planner import make_plan
    from sapf_ray.report.tables import plan_table

    cluster = open_cluster(
        namespace.cluster_devices,
        config,
        costs_file=namespace.cluster_costs,
        price=namespace.cluster_price,
    )
    n_records = config.data.n_records or open_source(config.data).n_train
    plan = make_plan(config, n_records)
    times = None if cluster is None else estimate(config, plan, cluster)
    if namespace.json:
        print(json.dumps(plan.to_dict() | ({} if times is None else {"cluster": times.to_dict()})))
    else:
        console.print(plan_table(plan))
        if times is not None:
            console.print(times.table())


def _ledger(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.runs.directory import RunDirectory

    console.print(Ledger.open(RunDirectory(namespace.directory).ledger).summary())


def _open_grid(name: str, namespace: jsonargparse.Namespace) -> Grid:
    from sapf_ray.errors import ConfigError
    from sapf_ray.tune.grid import open_grid

    only = {}
    for part in (
        re.split(r",\s*(?=[\w.]+=)", namespace.only) if namespace.only else []
    ):  # a label may hold a comma
        axis, equals, label = part.partition("=")
        if not equals:
            raise ConfigError(
                "--only", namespace.only, "must be AXIS=LABEL, or several separated by commas"
            )
        only[axis.strip()] = label.strip()
    for option, lowest in (("max_concurrent", 0), ("retries", 0)):
        if namespace[option] < lowest:
            raise ConfigError(f"--{option}", namespace[option], f"must be at least {lowest}")
    overrides = {key: namespace[key] for key in namespace.given}
    return open_grid(
        name,
        namespace.out,
        smoke=namespace.smoke,
        overrides=overrides,
        only=only,
        strict=not namespace.dry_run,
    )


def _tune(namespace: jsonargparse.Namespace, console: Console) -> None:
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


def _reproduce(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.paper.accounting import TABLES, reproduce_accounting
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


def _datasets(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.data.catalog import datasets_json, datasets_table

    _show(namespace.json, datasets_json, datasets_table, console)


def _methods(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.methods import methods_json, methods_table

    _show(namespace.json, methods_json, methods_table, console)


def _models(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.models.catalog import models_json, models_table

    _show(namespace.json, models_json, models_table, console)


def _show(
    as_json: bool,
    rows: Callable[[], list[dict[str, Any]]],
    table: Callable[[], Table],
    console: Console,
) -> None:
    if as_json:
        print(json.dumps(rows(), indent=2))
    else:
        console.print(table())


_COMMANDS = {
    "run": _run,
    "plan": _plan,
    "ledger": _ledger,
    "tune": _tune,
    "reproduce": _reproduce,
    "datasets": _datasets,
    "methods": _methods,
    "models": _models,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 2 bad input, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault(
        "RAY_ENABLE_AUTO_CONNECT", "0"
    )  # else a thread that outlives ctrl-C starts Ray again
    console = Console()
    try:
        parser = _parser()
        if not arguments:
            parser.print_help()
            return 2
        namespace = parser.parse_args(_expand(arguments))
        command = _COMMANDS[namespace.command]
        values = namespace[namespace.command]
        if namespace.command in ("tune", "reproduce"):
            values["given"] = _given(arguments)
        command(values, console)
    except SapfError as error:
        sys.stderr.write(f"sapf: error: {_one_line(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        command_line = " ".join(["sapf", *arguments])
        sys.stderr.write(
            f"\nsapf: interrupted; nothing is lost. The same command continues: {command_line}\n"
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(
            f"sapf: error: {_one_line(str(error))}; nothing is lost, the same command goes on when there is room\n"
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
