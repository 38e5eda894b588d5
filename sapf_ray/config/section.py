"""What makes a class a section of the config: frozen, validated by its types, errors of one line.

>>> @section("cake")
... class Cake:
...     weight: float = 0.5
>>> Cake(weight=1)
Cake(weight=1.0)
>>> Cake(weight="heavy")
Traceback (most recent call last):
sapf_ray.errors.ConfigError: cake.weight = 'heavy': must be a value of type float
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sapf_ray.config.kinds import kind_of
from sapf_ray.errors import ConfigError

Class = TypeVar("Class", bound=type)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def section(name: str) -> Callable[[Class], Class]:
    """Class decorator: a frozen keyword-only dataclass whose fields are validated by their types.

    A value is never made fit: text is no number, true is no 1; but an int serves as a float, and a
    list as a tuple. Conditions over several fields stand in the class's ``__post_init__``, see
    :func:`require`.

    Args:
        name: Key of the section; empty for the whole config, whose fields may be sections.
    """
    options = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def decorate(cls: Class) -> Class:
        made = pydantic_dataclass(cls, frozen=True, kw_only=True, config=options)
        validating: Any = made.__init__

        @functools.wraps(validating)
        def __init__(self: Any, **values: Any) -> None:
            try:
                validating(self, **values)
            except pydantic.ValidationError as error:
                raise _translated(error, name, made) from None

        made.__init__ = __init__  # type: ignore[method-assign]
        return typing.cast(Class, made)

    return decorate


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """For conditions over several fields: one line that names the key, its value, what is allowed.

    Raises:
        ConfigError: The condition does not hold.
    """
    if not ok:
        raise ConfigError(name, value, allowed)


def field_types(cls: type) -> dict[str, Any]:
    """Field name to annotation, ranges included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_section(annotation: Any) -> bool:
    """Whether a field is a section of the config, and no value."""
    return dataclasses.is_dataclass(annotation)


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    """``unknown key``, what it may have been meant for, and the keys of its section."""
    keys = list(known)
    head, dot, _ = key.partition(".")
    same_section = [other for other in keys if dot and other.startswith(head + ".")]
    sections = dict.fromkeys(other.partition(".")[0] for other in keys)
    text = f"unknown key; allowed: {', '.join(same_section or sections)}"
    close = difflib.get_close_matches(key, keys, n=1)
    return f"{text}; did you mean {close[0]}?" if close else text


def _translated(error: pydantic.ValidationError, name: str, cls: type) -> ConfigError:
    """The first of pydantic's errors, in the words of the field's own type."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if isinstance(part, str)]
    value = first["input"]
    key = ".".join([name, *path] if name else path)
    if first["type"] == "unexpected_keyword_argument":
        return ConfigError(key, value, unknown_key(key, _keys(name, cls)))
    annotation: Any = cls
    for part in path:
        annotation = field_types(annotation)[part]
    if is_section(annotation):
        return ConfigError(key, value, "must be a mapping")
    kind = kind_of(annotation)
    if kind.many and not isinstance(first["loc"][-1], int):
        return ConfigError(key, value, "must be a list")
    if kind.base is float and type(value) is int:
        value = float(value)
    return ConfigError(key, value, kind.must_be(value))


def _keys(name: str, cls: type) -> list[str]:
    """Dotted keys of a section, or of the whole config where ``name`` is empty."""
    keys: list[str] = []
    for field, annotation in field_types(cls).items():
        key = f"{name}.{field}" if name else field
        keys += _keys(key, annotation) if is_section(annotation) else [key]
    return keys
