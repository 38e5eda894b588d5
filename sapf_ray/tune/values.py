"""Types of config values that come from YAML, where ``1e-3`` is a word and nothing checks what a
dataclass is given.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.errors import ConfigError


@functools.cache
def _kinds() -> dict[str, Any]:
    """Dotted key to annotated type."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            kinds.update(
                {f"{name}.{key}": value for key, value in typing.get_type_hints(kind).items()}
            )
        else:
            kinds[name] = kind
    return kinds


def typed(key: str, value: Any) -> Any:
    """The value as its field's type.

    Raises:
        ConfigError: Unknown key, or a value of another type.
    """
    kinds = _kinds()
    if key not in kinds:
        section = [name for name in kinds if name.startswith(key.split(".")[0] + ".")]
        raise ConfigError(
            key,
            value,
            "unknown key; allowed: "
            + ", ".join(section or sorted({k.split(".")[0] for k in kinds})),
        )
    kind = kinds[key]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    kind = typing.get_origin(kind) or kind
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is tuple and isinstance(
        value, list
    ):  # YAML has lists only; what may be in them the config checks
        return tuple(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(key, value, f"must be a value of type {kind.__name__}")
