"""Types that are ranges: what a config field takes, read from its annotation.

The annotation is the only place where a range stands. Pydantic validates by it, and a
:class:`Kind` words it: for the one-line error, for ``--help``, and to read a flag's text.

>>> kind_of(Share).must_be()
'must lie in (0, 1]'
>>> kind_of(Count | None).hint()
'int >= 1, or null'
>>> kind_of(tuple[Count, ...]).read("1,2")
[1, 2]
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Interval
from pydantic import Strict
from pydantic_core import core_schema

from sapf_ray import registry
from sapf_ray.config.yaml_text import parse_yaml


@dataclass(frozen=True)
class NameIn:
    """Marks a ``str`` field that takes the names of a table (:mod:`sapf_ray.registry`).

    Attributes:
        key: The table's config key.
    """

    key: str

    def names(self) -> tuple[str, ...]:
        """Names that are allowed now, those of loaded plugins included."""
        return registry.names(self.key)

    def refusal(self, name: str) -> str:
        """Why a name that users look for is not among them."""
        return registry.refusal(self.key, name)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], core_schema.CoreSchema]
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self.names():
            raise ValueError(name)
        return name


class Auto:
    """Marks an optional field whose missing value is worded ``auto``: chosen at a run's start."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], core_schema.CoreSchema]
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: None if value == AUTO else value, handler(source)
        )


AUTO = "auto"

Positive = Annotated[float, Interval(gt=0)]
NotNegative = Annotated[float, Interval(ge=0)]
Share = Annotated[float, Interval(gt=0, le=1)]
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
Count = Annotated[int, Interval(ge=1)]
CountOrZero = Annotated[int, Interval(ge=0)]
AutoCount = Annotated[Count | None, Auto()]
AutoGpus = Annotated[NotNegative | None, Auto()]

# Marks a tuple that may be given as a list, as YAML has lists only.
FromList = Strict(False)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a field takes.

    Attributes:
        base: bool, int, float or str.
        interval: Range of a number.
        choices: Allowed words of a str, requested anew each time, for tables are open; None where
            any text is allowed.
        refusal: Why a certain word is not among them; empty where there is no more to say.
        optional: Whether null is allowed.
        auto: Whether ``auto`` is another word for null.
        many: Whether the field takes a list of such values.
    """

    base: type
    interval: Interval = dataclasses.field(default_factory=Interval)
    choices: Callable[[], tuple[str, ...]] | None = None
    refusal: Callable[[str], str] | None = None
    optional: bool = False
    auto: bool = False
    many: bool = False

    def must_be(self, value: Any = None) -> str:
        """What is allowed, as the last part of an error about ``value``."""
        if self.auto:
            return dataclasses.replace(self, auto=False).must_be(value) + f", or {AUTO}"
        if self.choices is not None:
            why = self.refusal(value) if self.refusal and isinstance(value, str) else ""
            return why or "must be one of " + ", ".join(self.choices())
        if self.base is bool:
            return "must be true or false"
        if self.base is int:
            least = "" if self.interval.ge is None else f" of at least {self.interval.ge}"
            return "must be an integer" + least
        if self.base is str or isinstance(value, bool | str | list | dict):
            return f"must be a value of type {self.base.__name__}"
        if _upper(self.interval) is not None:
            return f"must lie in {_bounds(self.interval)}"
        finite = (
            "a finite number " if value in (float("inf"), float("-inf")) or value != value else ""
        )
        if self.interval.gt is not None:
            return f"must be {finite}above {self.interval.gt}"
        return f"must be {finite + 'of ' * bool(finite)}at least {self.interval.ge}"

    def hint(self) -> str:
        """Type and range in a few characters, for ``--help``."""
        text = self.base.__name__
        if self.choices is not None:
            text = "{" + ", ".join(self.choices()) + "}"
        elif self.base is bool:
            text = "true or false"
        elif _upper(self.interval) is not None:
            text += f" in {_bounds(self.interval)}"
        elif self.interval.gt is not None:
            text += f" > {self.interval.gt}"
        elif self.interval.ge is not None:
            text += f" >= {self.interval.ge}"
        return ("list of " if self.many else "") + text + self._nothing()

    def _nothing(self) -> str:
        if self.auto:
            return f", or {AUTO}"
        return ", or null" if self.optional else ""

    def read(self, text: str) -> Any:
        """A flag's text as a value, still to be validated; lists as ``a,b`` or ``[a, b]``."""
        if self.optional and text in ("null", "None"):
            return None
        if self.auto and text == AUTO:
            return None
        if self.many and not text.startswith("["):
            one = dataclasses.replace(self, many=False, optional=False)
            return [one.read(part.strip()) for part in text.split(",")]
        if self.base is str and not self.many:
            return text
        try:
            return parse_yaml(text)
        except yaml.YAMLError:
            return text


def kind_of(annotation: Any) -> Kind:
    """The kind of a field's annotation: Annotated, Literal, tuple, or one of them or None."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (part for part in arguments if part is not type(None))
        return dataclasses.replace(kind_of(inner), optional=True)
    if origin is Annotated:
        kind = kind_of(arguments[0])
        for mark in arguments[1:]:
            if isinstance(mark, Auto):
                kind = dataclasses.replace(kind, auto=True)
            if isinstance(mark, Interval):
                kind = dataclasses.replace(kind, interval=mark)
            if isinstance(mark, NameIn):
                kind = dataclasses.replace(kind, choices=mark.names, refusal=mark.refusal)
        return kind
    if origin is tuple:
        return dataclasses.replace(kind_of(arguments[0]), many=True)
    if origin is Literal:
        return Kind(base=str, choices=lambda: arguments)
    assert annotation in (bool, int, float, str), annotation
    return Kind(base=annotation)


def _upper(interval: Interval) -> Any:
    return interval.le if interval.lt is None else interval.lt


def _bounds(interval: Interval) -> str:
    """``(0, 1]``: a round bracket where the bound itself is excluded."""
    left = "[" if interval.gt is None else "("
    lower = interval.ge if interval.gt is None else interval.gt
    right = "]" if interval.lt is None else ")"
    return f"{left}{lower}, {_upper(interval)}{right}"
