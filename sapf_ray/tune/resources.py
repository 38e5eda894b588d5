"""What a grid will take besides privacy, known before it starts: time, and room on the disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import RunConfig, config_hash
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import SapfError
from sapf_ray.estimate.cluster import estimate_run
from sapf_ray.estimate.costs import shipped_costs
from sapf_ray.estimate.result import Cluster
from sapf_ray.models.location import BUNDLED_DIR
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.tune.budget import PlannedCell


def guessed_seconds(config: RunConfig, plan: PrivacyPlan) -> float:
    """Seconds of one run from rates of another machine: the order of magnitude, no more.

    Rates of two cores where the model is bundled, else of the paper's four A6000s.
    """
    machine = "cpu2" if _is_bundled(config) else "a6000"
    costs = shipped_costs()[machine]
    cluster = Cluster(
        name="",
        count=costs.devices,
        costs=costs,
    )
    return 3600 * estimate_run(config, plan, cluster=cluster).hours


def _is_bundled(config: RunConfig) -> bool:
    return (BUNDLED_DIR / config.model.path).is_dir()


_PNG_BYTES = 1.5  # of a pixel
_ROW_BYTES = 2e3  # of an image beside its pixels


def disk_bytes(item: PlannedCell) -> float:
    """What one run writes, about: its images, latents where it trains, and what scores read."""
    config = item.cell.config
    side = config.model.resolution or (32 if _is_bundled(config) else 512)
    made = config.synthesis.side(side)
    needed = (_ROW_BYTES + _PNG_BYTES * made**2) * config.synthesis.n_images
    if config.evaluation.enabled:  # as many real images beside them, at most
        row = DATA_SETS.get(config.data.source)
        native = config.data.resolution or (row.resolution if row else None) or made
        compared = config.evaluation.compared_at(native, made)
        needed += 2 * 3.0 * compared**2 * config.synthesis.n_images
    if item.plan.finetune is not None:
        reduced = 4 if _is_bundled(config) else 8  # by the VAE
        needed += 8 * 4.0 * (side / reduced) ** 2 * item.plan.n_records
    return needed


def check_disk(todo: Sequence[PlannedCell], out: Path) -> str | None:
    """A warning where the disk will not hold all of the cells, about.

    Raises:
        SapfError: It does not hold the largest one.
    """
    if not todo:
        return None
    whole = out.resolve()
    place = next(path for path in (whole, *whole.parents) if path.exists())
    free = shutil.disk_usage(place).free
    sizes = {item.cell.name: disk_bytes(item) for item in todo}
    name, largest = max(sizes.items(), key=lambda pair: pair[1])
    if free < largest:
        raise SapfError(
            f"--out {out}: cell {name} writes about {largest / 1e9:.1f} GB, "
            f"the disk has {free / 1e9:.1f} GB free"
        )
    total = sum(sizes.values())
    if free < total:
        return (
            f"{out}: the grid writes about {total / 1e9:.0f} GB, "
            f"the disk has {free / 1e9:.0f} GB free"
        )
    return None


@dataclass(frozen=True)
class CellTime:
    """Time of one cell.

    Attributes:
        seconds: All stages together.
        source: Where they come from: ``measured`` (this very cell), ``like it`` or ``guess``.
    """

    seconds: float
    source: str


def cell_times(planned: Sequence[PlannedCell], out: Path) -> dict[str, CellTime]:
    """Time of each cell by name, from the runs of ``out`` that are done.

    Runs of the same model and data set that have the guess's order of magnitude wrong have it wrong
    alike, so a cell without a run is the guess times the median of measured over guessed.
    """
    guesses = {item.cell.name: guessed_seconds(item.cell.config, item.plan) for item in planned}
    measured: dict[str, float] = {}
    ratios: dict[str, list[float]] = {}
    for item in planned:
        name = item.cell.name
        seconds = measured_seconds(out / name)
        if seconds is not None:
            measured[name] = seconds
            alike = ratios.setdefault(_kind(item.cell.config), [])
            alike.append(seconds / guesses[name])
    times = {}
    for item in planned:
        name = item.cell.name
        alike = sorted(ratios.get(_kind(item.cell.config), []))
        if name in measured:
            times[name] = CellTime(measured[name], "measured")
        elif alike:
            median = alike[len(alike) // 2]
            times[name] = CellTime(guesses[name] * median, "like it")
        else:
            times[name] = CellTime(guesses[name], "guess")
    return times


def _kind(config: RunConfig) -> str:
    return config_hash(config, "model", "data")


def measured_seconds(directory: Path) -> float | None:
    """Seconds of a finished run, all stages; None where it is not finished."""
    run = RunDirectory(directory)
    if not run.metrics.exists():
        return None
    total = 0.0
    for value in run.read_json(run.metrics).get("seconds", {}).values():
        if isinstance(value, (int, float)) and math.isfinite(value):
            total += value
    return total
