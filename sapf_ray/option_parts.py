"""What the options of ``sapf`` are built of: a parser with one-line errors, config keys."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from typing import Any, NoReturn

from sapf_ray.config.fields import fields, section_titles
from sapf_ray.config.kinds import AUTO, Kind
from sapf_ray.errors import ConfigError
from sapf_ray.presets import presets

_SHORT = {
    "cluster.address": ("--address",),
    "cluster.publish_not_private": ("--not_private", "--not-private"),
}
"""Config keys that have a shorter option, too."""


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write("sapf: error: " + " ".join(message.split()) + "\n")
        sys.exit(2)


def add_config_keys(
    parser: argparse.ArgumentParser, keys: Collection[str] | None = None, *, of_run: bool = False
) -> None:
    """Options for the keys, all of them unless given; where they are a run's, so are defaults."""
    chosen = {key: field for key, field in fields().items() if keys is None or key in keys}
    sections = {field.section for field in chosen.values()}
    groups = {
        section: parser.add_argument_group(section or "run", _escaped(title))
        for section, title in section_titles().items()
        if section in sections
    }
    for key, field in chosen.items():
        names = [f"--{key}", *_SHORT.get(key, ())]
        alone: dict[str, Any] = {}
        if key in _SHORT and field.kind.base is bool:
            alone = {"nargs": "?", "const": True}
        default = json.dumps(field.default) if field.default != "" else '""'
        if field.default is None and field.kind.auto:
            default = AUTO
        shown = "the run's" if of_run else default.strip(chr(34))
        groups[field.section].add_argument(
            *names,
            dest=key,
            type=field.kind.read,
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=_escaped(f"({field.kind.hint()}) {field.help} (default: {shown})"),
            **alone,
        )


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def add_config_sources(parser: argparse.ArgumentParser) -> None:
    """Options for whole configs: presets, methods, files."""
    parser.add_argument(
        "--preset", default=None, help="Start from a preset: " + ", ".join(presets())
    )
    parser.add_argument(
        "--method", default=None, help="A row of `sapf methods`; files and flags override it."
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="YAML file with the keys below; flags override it.",
    )


INTEGER = Kind(base=int)
NUMBER = Kind(base=float)
SWITCH = Kind(base=bool)


def add(
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

    switch = {"nargs": "?", "const": True} if kind is SWITCH else {}
    parser.add_argument(*names, type=read, default=default, help=help, **switch)  # type: ignore[arg-type]
