"""A grid as data: one YAML file in ``tune_spaces/``, each of its cells a whole :class:`RunConfig`.

A file's keys, all but ``title`` optional::

    title: Table 6, cross-attention queries only
    from: paper                     # tune_spaces/common/paper.yaml comes first: its base, named
                                    # values and pairs
    preset: digits                  # a preset of `sapf run --preset`
    base: {finetune.steps: 1000}    # dotted config keys
    axes:                           # the product of all of them, the last one fastest
      dataset: [cifar10, celeba]    # names of `values`, or values of the axis's config key
      method: {DP-LoRA: dp-lora}    # label: value of the key, or a mapping of dotted keys
      seed: [0, 1, 2]
    rows: {"lr 2e-2": {finetune.learning_rate: 0.02}}     # one more axis, labels to overrides
    skip: [{dataset: celeba, seed: 2}]                    # label combinations that are left out;
                                                          # a list means any of them
    beside: {dataset: {digits: cifar10}}                  # the paper's label to print beside ours
    repeatable: true                # privacy.reproducible_seed = seed: for research, not for
                                    # release
    real_data: true                 # also score a classifier trained on the real images
    smoke: {from: smoke, axes: {dataset: [digits]}}       # under --smoke replaces these keys, axis
                                                          # by axis

A cell is made in this order, later ones win: preset, base, the command line's overrides, the
method's row, axes. An override cannot change what an axis sets (that is refused) or what makes a
method (its row stays).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sapf_ray.config import RunConfig, from_dict, result_keys
from sapf_ray.config.yaml_text import parse_yaml
from sapf_ray.errors import ConfigError, SapfError
from sapf_ray.files import short_hash
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
NAME_BYTES = 180  # of a cell's name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Name of its run directory; made from the labels.
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
    """A space file with its common files merged in; the module's docstring has the keys."""

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
    nested: dict[str, Any] = {}
    for key, value in base.items():
        nested[key] = dict(value) if isinstance(value, Mapping) else value
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = value
    return nested


def space_directories() -> list[Path]:
    """Where a bare name is looked for: beside the user, then among those that are shipped."""
    return [Path("tune_spaces"), Path(str(files("sapf_ray") / "tune_spaces"))]


def space_names() -> list[str]:
    """Bare names that :func:`load_space` takes."""
    names = set()
    for directory in space_directories():
        names |= {path.stem for path in directory.glob("*.yaml")}
    return sorted(names)


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
        spec = _with_smoke(path, spec)
    if spec["from"]:
        common = _read(_find(f"common/{spec['from']}", path.parent))
        spec = _with_common(spec, common)
    axes = {}
    if spec["rows"]:
        axes[ROW] = _axis(path, ROW, value=spec["rows"], named={})
    for axis, value in spec["axes"].items():
        named = spec["values"].get(axis, {})
        axes[axis] = _axis(path, axis, value=value, named=named)
    return Space(
        name=f"{path.stem}-smoke" if smoke else path.stem,
        title=spec["title"],
        preset=spec["preset"],
        base=spec["base"],
        axes=axes,
        skip=spec["skip"],
        beside=spec["beside"],
        repeatable=spec["repeatable"],
        real_data=spec["real_data"],
    )


def _with_smoke(path: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """The file with its smoke block applied, axis by axis; null removes an axis."""
    block = spec["smoke"]
    if not block:
        raise SapfError(f"{path}: has no smoke block; run it without --smoke")
    _check_keys(path, block, prefix="smoke.")
    merged = {**spec["axes"], **block.get("axes", {})}
    axes = {axis: value for axis, value in merged.items() if value is not None}
    return {**spec, **block, "axes": axes}


def _with_common(spec: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The file on top of its common file."""
    return {
        **spec,
        "base": {**common["base"], **spec["base"]},
        "preset": spec["preset"] or common["preset"],
        "values": _merged_by_axis(common["values"], spec["values"]),
        "beside": _merged_by_axis(common["beside"], spec["beside"]),
    }


def _merged_by_axis(
    first: Mapping[str, Mapping[Any, Any]], second: Mapping[str, Mapping[Any, Any]]
) -> dict[str, dict[Any, Any]]:
    merged = {}
    for axis in [*first, *second]:
        merged[axis] = {**first.get(axis, {}), **second.get(axis, {})}
    return merged


def _find(name: str, beside: Path | None = None) -> Path:
    given = Path(name).expanduser()
    directories = space_directories()
    if beside:
        directories.insert(0, beside)
    candidates = [directory / f"{name}.yaml" for directory in directories]
    if given.suffix in (".yaml", ".yml"):
        candidates.insert(0, given)
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(space_names())
    raise SapfError(f"{name}: no such space; give a YAML file or one of {known}")


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SapfError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(spec, dict):
        raise SapfError(f"{path}: must be a mapping with some of the keys {', '.join(_DEFAULTS)}")
    _check_keys(path, spec, prefix="")
    return {**_DEFAULTS, **spec}


def _check_keys(
    path: Path,
    spec: Mapping[str, Any],
    *,
    prefix: str,
) -> None:
    for key, value in spec.items():
        if key not in _DEFAULTS:
            raise SapfError(f"{path}: {prefix}{key}: unknown key; allowed: {', '.join(_DEFAULTS)}")
        default = _DEFAULTS[key]
        kind = str if default is None else type(default)
        if not isinstance(value, kind):
            raise SapfError(f"{path}: {prefix}{key} = {value!r}: must be a {kind.__name__}")


def _axis(
    path: Path,
    axis: str,
    *,
    value: Any,
    named: Mapping[Any, Any],
) -> dict[Any, Overrides]:
    """Label to overrides."""
    if not isinstance(value, (list, dict)) or not value:
        raise SapfError(
            f"{path}: axes.{axis} = {value!r}: must be a list of values or a mapping of labels to "
            "values"
        )
    if isinstance(value, list):
        for i, item in enumerate(value):
            if item in value[:i]:
                raise SapfError(f"{path}: axes.{axis}: {item!r} is there twice")
        value = {label: named.get(label, label) for label in value}
    key = AXIS_KEYS.get(axis, axis)
    overrides = {}
    for label, item in value.items():
        overrides[label] = dict(item) if isinstance(item, dict) else {key: item}
    return overrides


def make_cells(
    space: Space,
    overrides: Overrides | None = None,
    *,
    only: Mapping[str, str] | None = None,
) -> list[Cell]:
    """All cells of a grid, validated.

    Args:
        space: The space file.
        overrides: Dotted keys of the command line; they replace the file's base.
        only: Axis to label (as text): keeps these cells.

    Raises:
        SapfError: A key or value that cannot be, an override of what an axis sets, cells that
            repeat each other, or no cell at all; names the cell and the field.
    """
    overrides = overrides or {}
    only = only or {}
    _check_overrides(space, overrides)
    _check_only(space, only)
    preset = load_preset(space.preset) if space.preset else {}
    cells = []
    for combination in itertools.product(*space.axes.values()):
        labels = dict(zip(space.axes, combination, strict=True))
        if any(_matches(labels, skip) for skip in space.skip):
            continue
        as_text = {axis: str(label) for axis, label in labels.items()}
        if _matches(as_text, only):
            cells.append(_cell(space, preset, overrides=overrides, labels=labels))
    if not cells:
        raise SapfError(f"{space.name}: no cells; give axes or rows")
    _check_distinct(cells)
    return cells


def _matches(labels: Mapping[str, Any], some: Mapping[str, Any]) -> bool:
    """Whether a cell has all of some labels; of a list, one."""
    return all(
        labels.get(axis) in (label if isinstance(label, list) else [label])
        for axis, label in some.items()
    )


def _check_overrides(space: Space, overrides: Overrides) -> None:
    for axis, labels in space.axes.items():
        set_by_axis = {key for item in labels.values() for key in item}
        clash = set_by_axis & overrides.keys()
        if clash:
            raise SapfError(
                f"--{min(clash)}: is set by the axis {axis!r} of {space.name}; "
                f"use --only {axis}=LABEL to keep one"
            )


def _check_only(space: Space, only: Mapping[str, str]) -> None:
    for axis, label in only.items():
        allowed = f"axes are {', '.join(space.axes)}"
        if axis in space.axes:
            labels = [str(known) for known in space.axes[axis]]
            if label in labels:
                continue
            allowed = ", ".join(labels)
        raise SapfError(f"--only {axis}={label}: no such cell of {space.name}; {allowed}")


def _cell(
    space: Space,
    preset: Mapping[str, Any],
    *,
    overrides: Overrides,
    labels: Mapping[str, Any],
) -> Cell:
    name = cell_name(labels)
    own: Overrides = {}
    for axis, label in labels.items():
        own.update(space.axes[axis][label])
    base = {**space.base, **overrides}
    method = base.pop("method", None)
    method = own.pop("method", method)
    try:
        row = {} if method is None else find_method(str(method)).overrides
        nested = with_overrides(preset, {**base, **row, **own})
        if space.repeatable:
            seed = nested.get("seed", 0)
            nested = with_overrides(nested, {"privacy.reproducible_seed": seed})
        config = from_dict(nested)
    except ConfigError as error:
        raise SapfError(f"{space.name}, cell {name}: {error}") from error
    return Cell(
        name=name,
        labels=labels,
        method=method,
        config=config,
    )


def cell_name(labels: Mapping[str, Any]) -> str:
    """Name of a run directory: words as they are, numbers behind their axis's name; a long one ends
    in a hash, for file systems take 255 bytes and other names are made from it.
    """
    parts = []
    for axis, label in labels.items():
        if isinstance(label, str):
            text = label.replace("ε", "eps")
        else:
            text = f"{axis.rpartition('.')[2]}{label:g}".replace("ε", "eps")
        parts.append(re.sub(r"[^\w.=]+|_+", "-", text).strip("-"))
    name = "_".join(parts)
    whole = name.encode()
    if len(whole) <= NAME_BYTES:
        return name
    return f"{whole[: NAME_BYTES - 17].decode(errors='ignore')}-{short_hash(name)}"


def _check_distinct(cells: list[Cell]) -> None:
    by_result: dict[str, Cell] = {}
    by_name: dict[str, Cell] = {}
    for cell in cells:
        result = repr(sorted(result_keys(cell.config).items()))
        same = by_result.setdefault(result, cell)
        if same is not cell:
            raise SapfError(
                f"cells {same.name} and {cell.name} repeat each other: their configs are equal"
            )
        if by_name.setdefault(cell.name, cell) is not cell:
            raise SapfError(f"cell {cell.name}: two cells have this name; label them differently")
