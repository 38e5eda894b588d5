"""``sapf init``: a commented config for these images and this machine; asks nothing."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from sapf_ray.config import from_dict, nest
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.errors import SapfError, reason
from sapf_ray.estimate.machine import this_machine
from sapf_ray.estimate.sizing import Images, cached_model, can_train_large, choose
from sapf_ray.files import write_atomic
from sapf_ray.models.facts import find_facts
from sapf_ray.report.sizing import commented_yaml, sizing_lines


def write_first_config(
    photos: str,
    out: str,
    *,
    force: bool = False,
    minutes: float | None = None,
    given: dict[str, Any] | None = None,
) -> list[str]:
    """Writes the config.

    Args:
        photos: The images: ``data.path``.
        out: The file to write.
        force: Whether to replace a file.
        minutes: Time that the run may take; chosen by the machine unless given.
        given: Config keys that the user sets; they are kept.

    Returns:
        What was chosen and the next command, in lines.

    Raises:
        SapfError: The images cannot be listed, the file exists or cannot be written; one line.
    """
    file = Path(out).expanduser()
    if file.exists() and not force:
        raise SapfError(f"--out {out}: exists already; give another name, or --force to replace it")
    if minutes is not None and not minutes > 0:
        raise SapfError(f"--minutes {minutes:g}: must be above 0")
    keys = {**data_keys(photos), **(given or {})}
    place = Path(keys["data.path"])
    config = from_dict(nest(keys))
    source = open_source(config.data)
    machine = this_machine()
    facts = find_facts(config, source)
    sizing = choose(
        Images(
            n_train=source.n_train,
            n_classes=len(source.class_names),
            file_bytes=source.file_bytes(),
            words_known=facts.words.known,
            n_groups=0 if source.units is None else len(source.units),
        ),
        machine,
        minutes=minutes,
        given=keys,
        cached=cached_model() if can_train_large(machine) else None,
        factor=_factor(keys),
    )
    warning = facts.words.line(sizing.plan.remedies)
    if warning is not None:
        sizing = dataclasses.replace(sizing, notes=(*sizing.notes, warning))
    command = shlex.join(["sapf", "run", "--config", out, "--out", f"runs/{place.stem or 'mine'}"])
    text = commented_yaml(sizing, machine, command=command)
    try:
        write_atomic(file, text)
    except OSError as error:
        raise SapfError(f"--out {out}: cannot be written ({reason(error)})") from error
    lines = list(sizing_lines(sizing, machine, images=_words(source)))
    return [*lines, f"written:   {out}", f"next:      {command}"]


def _factor(keys: dict[str, Any]) -> float:
    """Size of the model that is given, if one is."""
    if "model.path" not in keys:
        return 1.0
    from sapf_ray.estimate.arithmetic import size_factor
    from sapf_ray.models.public_model import PublicModel

    return size_factor(PublicModel.open(from_dict(nest(keys)).model))


def data_keys(photos: str) -> dict[str, Any]:
    """``data.source`` and ``data.path`` of what lies there."""
    place = Path(photos).expanduser().absolute()
    return {"data.source": source_of(place), "data.path": str(place)}


_SIGNS = {
    "arrow": ("dataset_dict.json", "state.json"),
    "parquet": ("*.parquet", "data/*.parquet"),
    "webdataset": ("*.tar", "*/*.tar"),
    "npz": ("*.npz",),
}
"""Source to names of files by which it is recognised."""


def source_of(place: Path) -> str:
    """Name of the source that reads what is there, by names of files alone."""
    for name, patterns in _SIGNS.items():
        if place.is_dir():
            found = any(next(place.glob(pattern), None) for pattern in patterns)
        else:
            found = any(place.match(pattern) for pattern in patterns)
        if found:
            return name
    return "image_folder"


def _words(source: ImageSource) -> str:
    names = list(source.class_names)
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    groups = "" if source.units is None else f" in {len(source.units):,} groups"
    return (
        f"{source.n_train:,} to learn from{groups}, {source.n_test:,} to test with; "
        f"{len(names)} classes ({shown})"
    )
