"""Named starting points: one YAML file of config keys each."""

from __future__ import annotations

from importlib import resources
from typing import Any

from sapf_ray.config.yaml_text import parse_yaml
from sapf_ray.errors import SapfError

PRESETS = resources.files("sapf_ray") / "presets"


def presets() -> list[str]:
    """Names that ``--preset`` takes."""
    return sorted(
        p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name.endswith(".yaml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """A preset's overrides as nested dicts.

    Raises:
        SapfError: No such preset.
    """
    if name not in presets():
        raise SapfError(f"--preset {name}: unknown; must be one of {', '.join(presets())}")
    return parse_yaml((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
