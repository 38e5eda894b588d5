"""The ``sapf`` command: parse, call, print. No logic of its own.

Every option is a key of :mod:`sapf_ray.config`; YAML files and dotted flags use the same names. A later
source wins: defaults, ``--preset``, ``--config``, flags.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml
from rich.console import Console
from rich.table import Table

from sapf_ray.config import RunConfig, flatten, from_dict, to_dict
from sapf_ray.errors import SapfError

PRESETS = resources.files("sapf_ray") / "presets"
_FORMATS = Literal["text", "markdown", "csv", "latex"]


class _Parser(jsonargparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        sys.stderr.write("sapf: error: " + _explain(_one_line(message)) + "\n")
        sys.exit(2)


def _one_line(message: str) -> str:
    return " ".join(line.strip() for line in str(message).strip().splitlines() if line.strip())


def _explain(message: str) -> str:
    """jsonargparse's words, with the field, the value and what is allowed; unknown options get a suggestion."""
    wrong_type = re.search(r'Parser key "([\w.]+)".*Expected a <class \'(\w+)\'>\. Got value: (.*)', message)
    if wrong_type:
        field, kind, value = wrong_type.groups()
        return f"{field} = {value!r}: must be a value of type {kind}"
    not_listed = re.search(r'Parser key "([\w.]+)".*Expected a typing\.Literal\[(.*)\]\. Got value: (.*)', message)
    if not_listed:
        field, choices, value = not_listed.groups()
        return f"{field} = {value!r}: must be one of {choices}"
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '([\w.]+)'", message)
    if unknown is None:
        return message.replace("required: run.out", "required: --out")
    name = unknown.group(1) or unknown.group(2)
    keys = list(flatten(to_dict(RunConfig())))
    known = ["config", "preset", "out", "json", *keys]
    close = difflib.get_close_matches(name, known, n=1)
    section = [key for key in keys if key.startswith(name.split(".")[0] + ".")]
    allowed = section or ["config", "preset", "out", *dict.fromkeys(k.split(".")[0] + ".*" * ("." in k) for k in keys)]
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{name}: unknown key; {hint}allowed: {', '.join(allowed)}"


def presets() -> list[str]:
    """Names that ``--preset`` takes."""
    return sorted(p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """A preset's overrides as nested dicts."""
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


def _config_parser(description: str) -> _Parser:
    parser = _Parser(description=description, env_prefix="SAPF", exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with the keys below; flags override it.")
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


def _parser() -> _Parser:
    parser = _Parser(prog="sapf", description="Differentially private image synthesis on Ray.")
    commands = parser.add_subcommands(dest="command")
    run = _config_parser("Run or continue one experiment.")
    run.add_argument("--out", type=str, required=True, help="Run directory; the same command again continues it.")
    plan = _config_parser("Plan the privacy spend; reads no image.")
    plan.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON object.")
    ledger = _Parser(description="What a run spent, replayed from its ledger.")
    ledger.add_argument("directory", type=str, help="Run directory.")
    for name, sub in (("run", run), ("plan", plan)):
        sub.add_argument("--preset", type=str, default=None, help="Start from a preset: " + ", ".join(presets()))
        sub.add_argument("--method", type=str, default=None, help="A row of `sapf methods`; flags override it.")
        commands.add_subcommand(name, sub)
    commands.add_subcommand("ledger", ledger)
    reproduce = _Parser(description="A table of the paper, computed beside its printed values; reads no image.")
    reproduce.add_argument("table", type=str, help="table9, table10 or table13; up to a minute.")
    reproduce.add_argument("--format", type=_FORMATS, default="text", help="How to print it.")
    commands.add_subcommand("reproduce", reproduce)
    data_sets = _Parser(description="The data sets that data.source takes, and where to obtain them.")
    data_sets.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON list.")
    commands.add_subcommand("datasets", data_sets)
    methods = _Parser(description="The methods that --method takes.")
    methods.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="Print one JSON list.")
    commands.add_subcommand("methods", methods)
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
    """Puts the preset's file and the method's overrides first, so that every other option overrides them."""
    first: list[str] = []
    preset, method = _option(arguments, "--preset"), _option(arguments, "--method")
    if preset is not None:
        if preset not in presets():
            raise SapfError(f"--preset {preset}: unknown; must be one of {', '.join(presets())}")
        first += ["--config", str(PRESETS / f"{preset}.yaml")]
    if method is not None:
        from sapf_ray.methods import find_method

        first += [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in find_method(method).overrides.items()]
    return [*arguments[:1], *first, *arguments[1:]]


def _run_config(namespace: jsonargparse.Namespace, *own: str) -> RunConfig:
    values = namespace.as_dict()
    for name in (*own, "config", "preset", "method"):
        values.pop(name, None)
    return from_dict(values)


def _run(namespace: jsonargparse.Namespace, console: Console) -> None:
    config = _run_config(namespace, "out")
    from sapf_ray.pipeline import run  # torch, ray and diffusers load only where they are used
    from sapf_ray.report.terminal import progress_bars, result_table

    with progress_bars(console) as on_progress:
        result = run(config, namespace.out, on_progress)
    console.print(result_table(result))


def _plan(namespace: jsonargparse.Namespace, console: Console) -> None:
    config = _run_config(namespace, "json")
    from sapf_ray.data.base import open_source
    from sapf_ray.privacy.planner import make_plan, plan_table

    n_records = config.data.n_records or open_source(config.data).n_train
    plan = make_plan(config, n_records)
    if namespace.json:
        print(json.dumps(plan.to_dict()))
    else:
        console.print(plan_table(plan))


def _ledger(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.rundir import RunDirectory

    console.print(Ledger.open(RunDirectory(namespace.directory).ledger).summary())


def _reproduce(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.report.accounting import reproduce_accounting

    report = reproduce_accounting(namespace.table)
    if namespace.format == "text":
        console.print(report)
    else:
        print(report.render(namespace.format), end="")


def _datasets(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.data.catalog import datasets_json, datasets_table

    _show(namespace.json, datasets_json, datasets_table, console)


def _methods(namespace: jsonargparse.Namespace, console: Console) -> None:
    from sapf_ray.methods import methods_json, methods_table

    _show(namespace.json, methods_json, methods_table, console)


def _show(as_json: bool, rows: Callable[[], list[dict[str, Any]]], table: Callable[[], Table], console: Console) -> None:
    if as_json:
        print(json.dumps(rows(), indent=2))
    else:
        console.print(table())


_COMMANDS = {"run": _run, "plan": _plan, "ledger": _ledger, "reproduce": _reproduce, "datasets": _datasets, "methods": _methods}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 2 bad input, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    try:
        parser = _parser()
        if not arguments:
            parser.print_help()
            return 2
        namespace = parser.parse_args(_expand(arguments))
        command = _COMMANDS[namespace.command]
        command(namespace[namespace.command], console)
    except SapfError as error:
        sys.stderr.write(f"sapf: error: {_one_line(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        command_line = " ".join(["sapf", *arguments])
        sys.stderr.write(f"\nsapf: interrupted; nothing is lost. The same command continues: {command_line}\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
