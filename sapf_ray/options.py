"""The options of each command of ``sapf``, and how they become a config.

Every key of :mod:`sapf_ray.config` is an option of the same name. A later source wins: defaults,
``--preset``, ``--method``, ``--config``, flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sapf_ray import __version__
from sapf_ray.config import RunConfig, flatten, from_dict, nest
from sapf_ray.config.fields import fields
from sapf_ray.config.kinds import Count, Kind, kind_of
from sapf_ray.config.later import check_later, later_keys
from sapf_ray.config.section import unknown_key
from sapf_ray.config.yaml_text import read_yaml
from sapf_ray.errors import ConfigError, SapfError
from sapf_ray.methods import find_method
from sapf_ray.option_parts import Parser, add_config_keys, add_config_sources
from sapf_ray.presets import load_preset
from sapf_ray.registry import load_plugins

FORMATS = ("text", "markdown", "csv", "latex")
_INTEGER = Kind(base=int)
_NUMBER = Kind(base=float)
_SWITCH = Kind(base=bool)
_FORMAT = Kind(base=str, choices=lambda: FORMATS)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Config keys have their dotted names, and are there only where given.

    Args:
        arguments: Those behind ``sapf``, at least one.

    Raises:
        SapfError: An unknown option, a value that is none, or a plugin that cannot be imported.
    """
    if arguments[0] != "submit":  # its plugins are the cluster's
        _load_plugins(arguments)
    parser = make_parser(arguments[0])
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        option = next((text for text in rest if text.startswith("--")), None)
        if option is None:
            parser.error("unrecognized arguments: " + " ".join(rest))
        name, _, value = option.removeprefix("--").partition("=")
        if arguments[0] in ("synthesize", "evaluate") and name in fields():
            check_later(arguments[0], {name: value or next(iter(rest[1:]), None)})
        known = ["preset", "method", "config", "out", "json", "force", "minutes", *fields()]
        raise SapfError(f"{name}: {unknown_key(name, known)}")
    return namespace


def given_keys(namespace: argparse.Namespace) -> dict[str, Any]:
    """Config keys that the command line sets, with their values, not yet validated."""
    return {key: value for key, value in vars(namespace).items() if key in fields()}


def all_given_keys(namespace: argparse.Namespace) -> set[str]:
    """Config keys that files or the command line set; a preset or method is no such wish."""
    keys = set(given_keys(namespace))
    for path in namespace.config:
        keys |= set(flatten(read_yaml(path, option="--config")))
    return keys


def config_of(namespace: argparse.Namespace) -> RunConfig:
    """The config of ``sapf run`` and ``sapf plan``.

    Raises:
        SapfError: A file that cannot be read, or a value outside its range; one line.
    """
    flat: dict[str, Any] = {}
    if namespace.preset is not None:
        flat |= flatten(load_preset(namespace.preset))
    if namespace.method is not None:
        flat |= find_method(namespace.method).overrides
    for path in namespace.config:
        flat |= flatten(read_yaml(path, option="--config"))
    return from_dict(nest(flat | given_keys(namespace)))


def make_parser(command: str) -> Parser:
    """The parser of all commands, with the options of the one that is requested."""
    parser = Parser(prog="sapf", description="Differentially private image synthesis on Ray.")
    parser.add_argument("--version", action="version", version=f"sapf-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (description, add_options) in COMMANDS.items():
        sub = commands.add_parser(name, help=description, description=description)
        if name == command:
            add_options(sub)
    return parser


def _load_plugins(arguments: list[str]) -> None:
    """Before the parser is made, so that ``--help`` lists the plugins' rows too."""
    early = Parser(add_help=False)
    early.add_argument("--plugins", type=fields()["plugins"].kind.read, default=[])
    load_plugins(early.parse_known_args(arguments)[0].plugins)


def _add(
    parser: argparse.ArgumentParser, *names: str, kind: Kind, help: str, default: Any = None
) -> None:
    """An option that is no config key; its errors read like those of a config key."""
    option = names[0]

    def read(text: str) -> Any:
        value = kind.read(text)
        if kind.base is float and type(value) is int:
            value = float(value)
        if type(value) is not kind.base:
            raise ConfigError(option, value, kind.must_be(value))
        if kind.choices is not None and value not in kind.choices():
            raise ConfigError(option, value, kind.must_be(value))
        return value

    switch = {"nargs": "?", "const": True} if kind is _SWITCH else {}
    parser.add_argument(*names, type=read, default=default, help=help, **switch)  # type: ignore[arg-type]


def _run_options(parser: Parser) -> None:
    parser.usage = "sapf run --out DIRECTORY [OPTIONS]"
    parser.add_argument(
        "--out", required=True, help="Run directory; the same command again continues it."
    )
    _add(
        parser,
        "--verbose",
        kind=_SWITCH,
        default=False,
        help="Show the lines of run.log.jsonl on stderr as well.",
    )
    add_config_sources(parser)
    add_config_keys(parser)


def _synthesize_options(parser: Parser) -> None:
    parser.usage = "sapf synthesize RUN [OPTIONS]"
    parser.add_argument(
        "directory", metavar="RUN", help="Finished run, or RUN/synthesis/NAME of an earlier call."
    )
    _later_options(parser, "synthesize")


def _evaluate_options(parser: Parser) -> None:
    parser.usage = "sapf evaluate RUN|PARQUET [OPTIONS]"
    parser.add_argument(
        "directory",
        metavar="RUN|PARQUET",
        help="Finished run, RUN/synthesis/NAME, or any Parquet file or folder of images and labels "
        "(with --data.source).",
    )
    _json_option(parser, "Print the scores as one JSON object.")
    _later_options(parser, "evaluate")


def _later_options(parser: Parser, command: str) -> None:
    parser.add_argument(
        "--name", help="Name of the result's folder; by default made from what is changed."
    )
    _add(
        parser,
        "--verbose",
        kind=_SWITCH,
        default=False,
        help="Show the lines of run.log.jsonl on stderr as well.",
    )
    add_config_keys(parser, later_keys(command), of_run=True)


def _init_options(parser: Parser) -> None:
    parser.usage = "sapf init PHOTOS [--out run.yaml] [OPTIONS]"
    parser.add_argument("path", metavar="PHOTOS", help="Folder or file of the images.")
    parser.add_argument("--out", default="run.yaml", help="File to write (default: run.yaml).")
    _add(parser, "--force", kind=_SWITCH, default=False, help="Replace the file.")
    _add(
        parser,
        "--minutes",
        kind=_NUMBER,
        help="Time that the run may take (default: 10; 120 with a model for GPUs).",
    )
    add_config_keys(parser)


def _doctor_options(parser: Parser) -> None:
    parser.usage = "sapf doctor [PHOTOS] [OPTIONS]"
    parser.add_argument(
        "path", metavar="PHOTOS", nargs="?", help="Folder or file of the images, to check as well."
    )
    parser.add_argument(
        "--out", default="runs", help="Where run directories will be (default: runs)."
    )
    _json_option(parser, "Print one JSON list.")
    add_config_sources(parser)
    add_config_keys(parser)


def _plan_options(parser: Parser) -> None:
    parser.usage = "sapf plan [OPTIONS]"
    _json_option(parser, "Print one JSON object.")
    parser.add_argument(
        "--cluster_devices",
        "--cluster",
        metavar="KxDEVICE",
        help="Also estimate time and memory of each stage on K devices, from measured costs: "
        "4xa6000 (the paper's), 2xcpu2; `--cluster` for short.",
    )
    parser.add_argument(
        "--cluster_costs",
        help="Own measurement for it: results.json of `make bench`, or metrics.json of a finished "
        "run.",
    )
    _add(
        parser,
        "--cluster_price",
        kind=_NUMBER,
        help="Price of a device for an hour: adds costs to it.",
    )
    _add(
        parser,
        "--images_per_person",
        kind=kind_of(Count),
        help="Also say what the plan, made for images, promises a person with so many "
        "(docs/person-level.md); takes seconds.",
    )
    add_config_sources(parser)
    add_config_keys(parser)


def _ledger_options(parser: Parser) -> None:
    parser.usage = "sapf ledger PATH..."
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="Run directory; several, or folders of them: what all runs below on the same images "
        "cost together.",
    )


def _audit_options(parser: Parser) -> None:
    parser.usage = "sapf audit [RUN] [--out DIRECTORY] [OPTIONS]"
    parser.add_argument(
        "directory",
        metavar="RUN",
        nargs="?",
        help="Finished run with canaries (audit.canaries); without it one is made in --out.",
    )
    parser.add_argument("--out", help="Run directory to make; the same command continues it.")
    _json_option(parser, "Print one JSON object.")
    add_config_sources(parser)
    add_config_keys(parser)


def _verify_options(parser: Parser) -> None:
    parser.usage = "sapf verify RUN [OPTIONS]"
    parser.add_argument("directory", metavar="RUN", help="Directory of a finished run.")
    parser.add_argument(
        "--manifest_digest",
        "--manifest-digest",
        metavar="HEX",
        help="SHA-256 of its manifest.json as the run printed it: finds an edit that renewed the "
        "manifest, too.",
    )
    _json_option(parser, "Print one JSON object.")


def _grid_options(parser: Parser) -> None:
    parser.add_argument(
        "--out",
        help="Directory of the runs, runs/NAME unless given; the same command again continues it, "
        "and keeps what is finished.",
    )
    _add(parser, "--smoke", kind=_SWITCH, default=False, help="The small twin on embedded data.")
    _add(
        parser,
        "--dry_run",
        "--dry-run",
        kind=_SWITCH,
        default=False,
        help="List cells, budgets and times; start nothing.",
    )
    _add(
        parser,
        "--max_concurrent",
        "--max-concurrent",
        kind=_INTEGER,
        default=0,
        help="Cells at the same time; 0: as many as the cluster holds.",
    )
    _add(parser, "--retries", kind=_INTEGER, default=2, help="Retries of a cell that broke off.")
    parser.add_argument("--only", help="Cells with these labels, e.g. method=DP-SAPF,seed=0.")
    add_config_keys(parser)


def _tune_options(parser: Parser) -> None:
    parser.usage = "sapf tune SPACE [OPTIONS]"
    parser.add_argument("space", help="YAML file, or the name of one in tune_spaces/.")
    _add(
        parser,
        "--public_twin",
        "--public-twin",
        kind=_SWITCH,
        default=False,
        help="Run the cells on images that the public model draws, as many as the sensitive ones, "
        "of the same classes: choosing settings by their scores costs no privacy.",
    )
    _add(
        parser,
        "--private",
        kind=_SWITCH,
        default=False,
        help="Choose one cell privately, on the sensitive images: a random number of secret "
        "trials, scored by a noisy count, of which the best one is released (docs/tuning.md).",
    )
    _grid_options(parser)


def _reproduce_options(parser: Parser) -> None:
    parser.usage = "sapf reproduce TABLE [OPTIONS]"
    parser.add_argument(
        "table",
        help="table9, table10, table13: computed, reads no image, up to a minute; "
        "table2, 5, 6, 7, 8, 11, 12, 15, figure4, 5, 6, 7: runs or continues the grid.",
    )
    _add(
        parser,
        "--format",
        kind=_FORMAT,
        default="text",
        help="How to print it: " + ", ".join(FORMATS),
    )
    _grid_options(parser)


def _submit_options(parser: Parser) -> None:
    parser.usage = "sapf submit --address URL [OPTIONS] -- COMMAND ..."
    parser.add_argument("--address", required=True, help="Job server, e.g. http://head:8265.")
    _add(
        parser,
        "--install",
        kind=Kind(base=str, choices=lambda: ("pip", "image")),
        default="pip",
        help="Where nodes have the dependencies from: pip, or the container image.",
    )
    parser.add_argument(
        "--modules",
        action="append",
        default=[],
        help="Package or module to send beside sapf_ray, as for --plugins; may be repeated.",
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="The command: run, tune, plan ...",
    )


def _list_options(parser: Parser) -> None:
    _json_option(parser, "Print one JSON list.")


def _json_option(parser: Parser, help: str) -> None:
    _add(parser, "--json", kind=_SWITCH, default=False, help=help)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "init": ("Write a config that suits your images and this machine.", _init_options),
    "doctor": ("Check this machine, and print what mends each fault.", _doctor_options),
    "run": ("Run or continue one experiment.", _run_options),
    "plan": ("Plan the privacy spend; reads no image.", _plan_options),
    "synthesize": (
        "More synthetic images of a finished run; costs no privacy.",
        _synthesize_options,
    ),
    "evaluate": (
        "Other scores of a finished run, or of any Parquet data set.",
        _evaluate_options,
    ),
    "ledger": (
        "What a run spent, or several together, replayed from their ledgers.",
        _ledger_options,
    ),
    "audit": ("Attack a run's own claim with canaries: bounds on epsilon.", _audit_options),
    "verify": ("Whether a run's files hold together; reads no image.", _verify_options),
    "tune": ("Run or continue a grid of experiments, and print its table.", _tune_options),
    "reproduce": (
        "A table or figure of the paper, ours beside its printed values.",
        _reproduce_options,
    ),
    "submit": ("Run a command as a job of a Ray cluster, and wait for it.", _submit_options),
    "datasets": (
        "The data sets that data.source takes, and where to obtain them.",
        _list_options,
    ),
    "methods": ("The methods that --method takes.", _list_options),
    "models": (
        "The public models that --model.path takes by name, and where to obtain them.",
        _list_options,
    ),
}
"""Command → what it does, and the function that adds its options."""
