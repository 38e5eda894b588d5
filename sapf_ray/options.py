"""The command line of ``sapf``, and how its options become a config.

Every key of :mod:`sapf_ray.config` is an option of the same name. A later source wins: defaults,
``--preset``, ``--method``, ``--config``, flags.
"""

from __future__ import annotations

import argparse
from typing import Any

from sapf_ray import __version__
from sapf_ray.command_options import COMMANDS
from sapf_ray.config import RunConfig, flatten, from_dict, nest
from sapf_ray.config.fields import fields
from sapf_ray.config.later import check_later
from sapf_ray.config.section import unknown_key
from sapf_ray.config.yaml_text import read_yaml
from sapf_ray.errors import SapfError
from sapf_ray.methods import find_method
from sapf_ray.option_parts import Parser
from sapf_ray.presets import load_preset
from sapf_ray.registry import load_plugins


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
