"""A grid as data: one YAML file in ``tune_spaces/``, many cells, each cell a whole
:class:`RunConfig`.

A file's keys, all but ``title`` optional::

    title: Table 6, cross-attention queries only
    from: paper                     # tune_spaces/common/paper.yaml: its base, named values and
        pairs come first
    preset: digits                  # a preset of `sapf run --preset`
    base: {finetune.steps: 1000}    # dotted config keys
    axes:                           # the product of all of them, the last one fastest
      dataset: [cifar10, celeba]    # names of `values`, or values of the axis's config key
      method: {DP-LoRA: dp-lora}    # label: value of the key, or a mapping of dotted keys
      seed: [0, 1, 2]
    rows: {"lr 2e-2": {finetune.learning_rate: 0.02}}     # one more axis, labels to overrides
    skip: [{dataset: celeba, seed: 2}]                    # label combinations that are left out
    beside: {dataset: {digits: cifar10}}                  # which of the paper's labels to print
        beside ours
    repeatable: true                # privacy.reproducible_seed = seed: for research, not for
        release
    real_data: true                 # also score a classifier trained on the real images
    smoke: {from: smoke, axes: {dataset: [digits]}}       # replaces these keys, axis by axis, under
        --smoke

A cell is made in this order, later ones win: preset, base, the command line's overrides, the
method's row, axes. An override cannot change what an axis sets (that is refused) or what makes a
method (its row stays).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sapf_ray.config import RunConfig, from_dict, result_keys
from sapf_ray.config.yaml_text import parse_yaml
from sapf_ray.errors import ConfigError, SapfError
from sapf_ray.methods import find_method
from sapf_ray.presets import load_preset

Overrides = dict[str, Any]

# What an axis of this name sets.
AXIS_KEYS: Mapping[str, str] = {
    "model": "model.path",
    "dataset": "data.source",
    "epsilon": "privacy.epsilon",
    "ratio": "saliency.ratio",
    "sigma_s": "saliency.noise_multiplier",
    "method": "method",
    "seed": "seed",
}
_DEFAULTS: Mapping[str, Any] = {
    "title": "",
    "from": None,
    "preset": None,
    "base": {},
    "axes": {},
    "rows": {},
    "skip": [],
    "values": {},
    "beside": {},
    "repeatable": False,
    "real_data": False,
    "smoke": {},
}
ROW = "row"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Of its run directory; made from the labels.
        labels: Axis name to label, in the order of the axes.
        method: Row of the methods table; None where no axis and no base names one.
        config: The whole experiment.
    """

    name: str
    labels: Mapping[str, Any]
    method: str | None
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Space:
    """A space file, read and with its common files merged in; see the module's docstring for the
    keys.
    """

    name: str
    title: str
    preset: str | None
    base: Overrides
    axes: Mapping[str, Mapping[Any, Overrides]]
    skip: list[Mapping[str, Any]] = field(default_factory=list)
    beside: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    repeatable: bool = False
    real_data: bool = False


def with_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with dotted keys set; the argument is left as it is."""
    nested: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()
    }
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def space_directories() -> list[Path]:
    """Where a bare name is looked for."""
    return [Path("tune_spaces"), Path(__file__).resolve().parents[2] / "tune_spaces"]


def space_names() -> list[str]:
    """Bare names that :func:`load_space` takes."""
    return sorted(
        {path.stem for directory in space_directories() for path in directory.glob("*.yaml")}
    )


def load_space(name: str, smoke: bool = False) -> Space:
    """Reads a space file.

    Args:
        name: Path, or bare name of a file in ``tune_spaces/``.
        smoke: Apply the file's ``smoke`` block.

    Raises:
        SapfError: No such file, not a mapping, an unknown key, or no smoke block; one line that
            names it.
    """
    path = _find(name)
    spec = _read(path)
    if smoke:
        block = spec["smoke"]
        if not block:
            raise SapfError(f"{path}: has no smoke block; run it without --smoke")
        _check_keys(path, block, prefix="smoke.")
        spec = {**spec, **block, "axes": _merged_axes(spec["axes"], block.get("axes", {}))}
    values: dict[str, dict[Any, Any]] = {}
    if spec["from"]:
        common = _read(_find(f"common/{spec['from']}", path.parent))
        spec = {
            **spec,
            "base": {**common["base"], **spec["base"]},
            "preset": spec["preset"] or common["preset"],
        }
        spec["beside"] = {
            axis: {**common["beside"].get(axis, {}), **spec["beside"].get(axis, {})}
            for axis in [*common["beside"], *spec["beside"]]
        }
        values = common["values"]
    for axis, own in spec["values"].items():
        values[axis] = {**values.get(axis, {}), **own}
    axes = {
        axis: _axis(path, axis, value=value, named=values.get(axis, {}))
        for axis, value in spec["axes"].items()
    }
    if spec["rows"]:
        axes = {ROW: _axis(path, ROW, value=spec["rows"], named={}), **axes}
    return Space(
        name=path.stem + "-smoke" * smoke,
        title=spec["title"],
        preset=spec["preset"],
        base=spec["base"],
        axes=axes,
        skip=spec["skip"],
        beside=spec["beside"],
        repeatable=spec["repeatable"],
        real_data=spec["real_data"],
    )


def _find(name: str, beside: Path | None = None) -> Path:
    given = Path(name).expanduser()
    candidates = [given] if given.suffix in (".yaml", ".yml") else []
    candidates += [
        directory / f"{name}.yaml"
        for directory in ([beside] if beside else []) + space_directories()
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise SapfError(f"{name}: no such space; give a YAML file or one of {', '.join(space_names())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = parse_yaml(path.read_text())
    except yaml.YAMLError as error:
        raise SapfError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(spec, dict):
        raise SapfError(f"{path}: must be a mapping with some of the keys {', '.join(_DEFAULTS)}")
    _check_keys(path, spec, prefix="")
    return {**_DEFAULTS, **spec}


def _check_keys(path: Path, spec: Mapping[str, Any], *, prefix: str) -> None:
    for key, value in spec.items():
        if key not in _DEFAULTS:
            raise SapfError(f"{path}: {prefix}{key}: unknown key; allowed: {', '.join(_DEFAULTS)}")
        kind = type(_DEFAULTS[key]) if _DEFAULTS[key] is not None else str
        if not isinstance(value, kind):
            raise SapfError(f"{path}: {prefix}{key} = {value!r}: must be a {kind.__name__}")


def _merged_axes(full: Mapping[str, Any], smoke: Mapping[str, Any]) -> dict[str, Any]:
    """Axes of the smoke block take the place of those of the same name; null takes one away."""
    return {axis: value for axis, value in {**full, **smoke}.items() if value is not None}


def _axis(path: Path, axis: str, *, value: Any, named: Mapping[Any, Any]) -> dict[Any, Overrides]:
    """Label to overrides."""
    if not isinstance(value, (list, dict)) or not value:
        raise SapfError(
            f"{path}: axes.{axis} = {value!r}: must be a list of values or a mapping of labels to values"
        )
    if isinstance(value, list):
        repeated = next((item for i, item in enumerate(value) if item in value[:i]), None)
        if repeated is not None:
            raise SapfError(f"{path}: axes.{axis}: {repeated!r} is there twice")
        value = {label: named.get(label, label) for label in value}
    key = AXIS_KEYS.get(axis, axis)
    return {
        label: dict(item) if isinstance(item, dict) else {key: item}
        for label, item in value.items()
    }


def make_cells(
    space: Space, overrides: Overrides | None = None, *, only: Mapping[str, str] | None = None
) -> list[Cell]:
    """All cells of a grid, validated.

    Args:
        overrides: Dotted keys of the command line; they replace the file's base.
        only: Axis to label (as text): keeps these cells.

    Raises:
        SapfError: A key or value that cannot be, an override of what an axis sets, cells that
            repeat each other, or no cell at all; names the cell and the field.
    """
    overrides = overrides or {}
    for axis, labels in space.axes.items():
        clash = {key for item in labels.values() for key in item} & overrides.keys()
        if clash:
            raise SapfError(
                f"--{min(clash)}: is set by the axis {axis!r} of {space.name}; use --only {axis}=LABEL to keep one"
            )
    for axis, label in (only or {}).items():
        if label not in map(str, space.axes.get(axis, {})):
            allowed = (
                ", ".join(map(str, space.axes[axis]))
                if axis in space.axes
                else f"axes are {', '.join(space.axes)}"
            )
            raise SapfError(f"--only {axis}={label}: no such cell of {space.name}; {allowed}")
    preset = load_preset(space.preset) if space.preset else {}
    cells = []
    for combination in itertools.product(*space.axes.values()):
        named = dict(zip(space.axes, combination, strict=True))
        if any(
            all(named.get(axis) == label for axis, label in skip.items()) for skip in space.skip
        ):
            continue
        if all(str(named[axis]) == label for axis, label in (only or {}).items()):
            cells.append(_cell(space, preset, overrides=overrides, labels=named))
    if not cells:
        raise SapfError(f"{space.name}: no cells; give axes or rows")
    _check_distinct(cells)
    return cells


def _cell(
    space: Space, preset: Mapping[str, Any], *, overrides: Overrides, labels: Mapping[str, Any]
) -> Cell:
    name = cell_name(labels)
    own: Overrides = {}
    for axis, label in labels.items():
        own.update(space.axes[axis][label])
    base = {**space.base, **overrides}
    method = own.pop("method", base.pop("method", None))
    try:
        base.pop("method", None)
        row = {} if method is None else find_method(str(method)).overrides
        nested = with_overrides(preset, {**base, **row, **own})
        if space.repeatable:
            nested = with_overrides(nested, {"privacy.reproducible_seed": nested.get("seed", 0)})
        config = from_dict(nested)
    except ConfigError as error:
        raise SapfError(f"{space.name}, cell {name}: {error}") from error
    return Cell(name=name, labels=labels, method=method, config=config)


def cell_name(labels: Mapping[str, Any]) -> str:
    """Name of a run directory: words as they are, numbers behind their axis's name."""
    parts = []
    for axis, label in labels.items():
        text = str(label) if isinstance(label, str) else f"{axis.rpartition('.')[2]}{label:g}"
        parts.append(re.sub(r"[^\w.=]+|_+", "-", text.replace("ε", "eps")).strip("-"))
    return "_".join(parts)


def _check_distinct(cells: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    names: dict[str, Cell] = {}
    for cell in cells:
        same = seen.setdefault(repr(sorted(result_keys(cell.config).items())), cell)
        if same is not cell:
            raise SapfError(
                f"cells {same.name} and {cell.name} repeat each other: their configs are equal"
            )
        if names.setdefault(cell.name, cell) is not cell:
            raise SapfError(f"cell {cell.name}: two cells have this name; label them differently")
