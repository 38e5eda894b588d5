"""Which keys may be changed when a run is over, and what that is called.

>>> name_of({"synthesis.n_images": 4000, "synthesis.guidance_scale": 3.0})
'n_images-4000-guidance_scale-3'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sapf_ray.config.forms import flatten, to_dict
from sapf_ray.config.run import RunConfig
from sapf_ray.config.section import require
from sapf_ray.files import short_hash

_ALWAYS = (
    "model.path",  # may lie elsewhere by now
    "tracking.enabled",
    "tracking.uri",
    "tracking.experiment",
    "cluster.address",
    "cluster.num_cpus",
    "cluster.storage",  # may be gone by now
    "cluster.publish_not_private",
    "plugins",
)
_SECTIONS = {"synthesize": ("synthesis", "model.dtype"), "evaluate": ("evaluation", "data", "seed")}
_UNITS = ("data.groups", "data.max_images_per_group")  # matter to what is paid for alone
_NEVER = ("evaluation.enabled", "data.n_records", *_UNITS)
_LONGEST = 60  # characters of a name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


def later_keys(command: str) -> tuple[str, ...]:
    """Keys that ``sapf synthesize`` or ``sapf evaluate`` takes."""
    parts = _SECTIONS[command]
    return tuple(
        key
        for key in flatten(to_dict(RunConfig()))
        if key in _ALWAYS
        or (key not in _NEVER and (key in parts or key.partition(".")[0] in parts))
    )


def without_units(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes, and no groups where the images are others: a score does not ask whose they are.

    >>> without_units({"data.source": "digits"})["data.groups"] is None
    True
    """
    others = any(key.startswith("data.") for key in changes)
    return {**changes, **(dict.fromkeys(_UNITS) if others else {})}


def check_later(command: str, changes: Mapping[str, Any]) -> None:
    """Refuses what a finished run cannot change any more.

    Args:
        command: ``synthesize`` or ``evaluate``.
        changes: Dotted key to new value.

    Raises:
        ConfigError: Another key; names it.
    """
    allowed = later_keys(command)
    for key, value in changes.items():
        sections = dict.fromkeys(k.partition(".")[0] for k in allowed)
        hint = "; images have synthesis.seed" if key == "seed" else ""
        require(
            key in allowed,
            key,
            value,
            f"cannot be changed when a run is over, `sapf {command}` takes keys of "
            f"{', '.join(sections)}{hint}; for the rest start a new run",
        )


def name_of(changed: Mapping[str, Any]) -> str:
    """Name of a result by what is changed in it; the same for the same changes."""
    text = "-".join(f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in changed.items())
    if NAME.fullmatch(text) and len(text) <= _LONGEST:
        return text
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[: _LONGEST - 20].strip("_.-")
    return f"{clean}-{short_hash(dict(changed), digits=8)}"


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
