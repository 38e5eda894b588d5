"""Every field of the config by its dotted key: what it takes, its default, and its help.

>>> fields()["saliency.ratio"].kind.hint(), fields()["saliency.ratio"].default
('float in (0, 1]', 0.3)
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

from sapf_ray.config.kinds import Kind, kind_of
from sapf_ray.config.run import RunConfig
from sapf_ray.config.section import field_types, is_section


@dataclass(frozen=True, kw_only=True)
class Field:
    """One key.

    Attributes:
        section: Key of its section; empty for a key of the whole run.
        name: Last part of the key.
        kind: What it takes.
        default: Value where none is given.
        help: What the docstring of the section says of it.
    """

    section: str
    name: str
    kind: Kind
    default: Any
    help: str


@functools.cache
def fields() -> dict[str, Field]:
    """Dotted key to field, in the order of the sections."""
    found: dict[str, Field] = {}
    whole = RunConfig()
    for name, annotation in field_types(RunConfig).items():
        if is_section(annotation):
            found |= _fields_of(annotation, getattr(whole, name), section=name)
    return found | _fields_of(RunConfig, whole, section="")


def section_titles() -> dict[str, str]:
    """Section to the first sentence of its docstring."""
    sections = {name: cls for name, cls in field_types(RunConfig).items() if is_section(cls)}
    return {name: _summary(cls) for name, cls in sections.items()} | {"": _summary(RunConfig)}


def _fields_of(cls: type, defaults: Any, *, section: str) -> dict[str, Field]:
    texts = _argument_texts(cls)
    return {
        f"{section}.{name}" if section else name: Field(
            section=section,
            name=name,
            kind=kind_of(annotation),
            default=getattr(defaults, name),
            help=texts[name],
        )
        for name, annotation in field_types(cls).items()
        if not is_section(annotation)
    }


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0]


def _argument_texts(cls: type) -> dict[str, str]:
    """Field name to its text under ``Args:`` of the class's docstring, on one line."""
    _, _, block = (inspect.getdoc(cls) or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
