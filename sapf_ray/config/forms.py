"""A config as nested dicts, as flat keys, as a digest."""

from __future__ import annotations

import dataclasses
from typing import Any

from sapf_ray.config.run import EXECUTION_ONLY, NOT_COUNTED_WHEN_UNSET, RunConfig
from sapf_ray.config.section import field_types, is_section, require
from sapf_ray.files import short_hash
from sapf_ray.registry import load_plugins

_COUNTED = object()  # equals no value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(
        config,
        dict_factory=lambda items: {
            key: list(value) if isinstance(value, tuple) else value for key, value in items
        },
    )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"privacy": {"epsilon": 1}}`` → ``{"privacy.epsilon": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) and value else {name: value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"privacy.epsilon": 1}`` → ``{"privacy": {"epsilon": 1}}``.

    Raises:
        ConfigError: A key that is both a value and a section.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        place = nested.setdefault(section, {}) if section else nested
        require(isinstance(place, dict), section, place, "must be a mapping")
        if value != {}:
            place[name] = value
        else:
            place.setdefault(name, {})
    return nested


def from_dict(nested: dict[str, Any]) -> RunConfig:
    """Builds and validates a :class:`RunConfig` from nested dicts; loads its plugins first.

    Raises:
        ConfigError: Unknown key, or a value outside its range; names the dotted key.
        SapfError: A plugin that cannot be imported.
    """
    plugins = nested.get("plugins", ())
    if isinstance(plugins, list | tuple) and all(isinstance(name, str) for name in plugins):
        load_plugins(plugins)
    sections = {key: cls for key, cls in field_types(RunConfig).items() if is_section(cls)}
    values = {
        key: sections[key](**value) if key in sections and isinstance(value, dict) else value
        for key, value in nested.items()
    }
    return RunConfig(**values)


def result_keys(config: RunConfig) -> dict[str, Any]:
    """The flat config without what only says how the work is spread, and without newer keys that
    are not given.
    """
    return {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if key not in EXECUTION_ONLY and value != NOT_COUNTED_WHEN_UNSET.get(key, _COUNTED)
    }


def config_hash(config: RunConfig, *sections: str) -> str:
    """Hex digest over the result-bearing keys of the named sections (all when none is named)."""
    keys = {
        k: v for k, v in result_keys(config).items() if not sections or k.split(".")[0] in sections
    }
    return short_hash(keys)
