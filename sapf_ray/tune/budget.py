"""What a grid will spend, known before any of it starts: each cell's privacy plan, the total per
data set, the time.

The total composes the plans of all cells that read the same images (design rule 7): whoever sees
all the results, or one result that was picked after looking at all, has seen every release. Cells
with noise from fresh keys are independent mechanisms, so their events simply compose. A selection
release that several cells use (same key, same noise: :mod:`sapf_ray.saliency.shared`) is one
mechanism, and the fine-tunings that start from it are adaptive: it composes once.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import DataConfig, RunConfig, config_hash
from sapf_ray.data.base import open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import SapfError
from sapf_ray.estimate.cluster import Cluster
from sapf_ray.estimate.cluster import estimate as estimate_on
from sapf_ray.estimate.costs import shipped_costs
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.models.location import BUNDLED_DIR, resolve_model
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, default_delta, make_plan, plan_events
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.shared import released_stream, shared_folder
from sapf_ray.tune.space import Cell

SELECTIONS = ".selections"  # in a grid's directory


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its privacy plan."""

    cell: Cell
    plan: PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class Total:
    """What all cells on one data set spend together.

    Args:
        data: ``data.source``, with the path where there is one.
        runs: Cells that read its images, with noise.
        selecting: Those of them with a private selection.
        selections: Selections that they make; fewer where cells share one.
        epsilon: Their composition under PLD, at ``delta``.
        summed: Sum of their epsilons (basic composition), at the sum of their deltas.
        non_private: Cells that read its images without noise: with these released as well there is
            no guarantee.
        seeded: Cells whose noise can be repeated by whoever knows the seed: no guarantee against
            them.
    """

    data: str
    runs: int
    selecting: int
    selections: int
    epsilon: float
    delta: float
    summed: float
    summed_delta: float
    non_private: int
    seeded: int


@functools.lru_cache(maxsize=32)
def _shape(data: DataConfig) -> tuple[int, tuple[str, ...]]:
    """N and the classes' prompts; the files are looked at once for all cells."""
    source = open_source(data)
    return source.n_train, tuple(source.prompts)


def _n_records(data: DataConfig, strict: bool) -> int:
    """N: from the images where they are, else (unless ``strict``) the declared or the published
    number.
    """
    try:
        return _shape(data)[0]
    except SapfError:
        known = data.n_records or getattr(DATA_SETS.get(data.source), "n_train", None)
        if strict or known is None:
            raise
        return known


def plan_cells(cells: Sequence[Cell], strict: bool = False) -> list[PlannedCell]:
    """Plans every cell; reads no image.

    Args:
        strict: Wants the data sets and models to be there, and the candidate pools not to be empty,
            as before a start; without, published sizes serve where images are missing.

    Raises:
        SapfError: Epsilon cannot be met, data is missing, and the like; names the cell and the
            field.
    """
    planned = []
    for cell in cells:
        try:
            plan = make_plan(cell.config, _n_records(cell.config.data, strict))
            check_evaluation(cell.config.evaluation)
            if strict:
                _check_model(cell.config, plan)
        except SapfError as error:
            raise SapfError(f"cell {cell.name}: {error}") from error
        planned.append(PlannedCell(cell, plan))
    return planned


def _check_model(config: RunConfig, plan: PrivacyPlan) -> None:
    """A local model is there, knows the classes and has the pool; a hub id is left to its first
    run.
    """
    if Path(resolve_model(config.model.path)).is_dir():
        model = PublicModel.open(config.model)
        model.check_classes(_shape(config.data)[1])
        if plan.finetune is not None:
            model.pool(config.saliency.pool)


def selection_root(config: RunConfig, out: Path) -> Path:
    """Where the cells of a grid keep the selection releases that they share."""
    return (
        Path(config.cluster.selection_dir)
        if config.cluster.selection_dir
        else (out / SELECTIONS).resolve()
    )


def selection_names(item: PlannedCell, out: Path) -> set[str]:
    """Names of the cell's selection releases; cells that share a name share the release.

    Of a cell that paid for its selection, by its ledger. Others will use the shared release: the
    one that is there, or the one that the first of them makes.
    """
    if item.plan.selection is None:
        return set()
    run = RunDirectory(out / item.cell.name)
    if run.ledger.exists():
        streams = {
            event.noise_id
            for event in Ledger.open(run.ledger).events()
            if event.stage == "selection"
        }
        if streams:
            return streams
    folder = shared_folder(selection_root(item.cell.config, out), item.cell.config, plan=item.plan)
    return {released_stream(folder) or str(folder)}


def totals(planned: Iterable[PlannedCell], out: Path) -> list[Total]:
    """One line per data set whose images some cell reads.

    Args:
        out: Directory of the grid's runs: which selections are shared is read from what is there.
    """
    groups: dict[str, list[PlannedCell]] = {}
    for item in planned:
        if item.plan.reads_images:
            data = item.cell.config.data
            groups.setdefault(data.source + (f" ({data.path})" if data.path else ""), []).append(
                item
            )
    return [_total(name, items, out=out) for name, items in groups.items()]


def _total(name: str, items: list[PlannedCell], *, out: Path) -> Total:
    private = [item for item in items if not item.plan.non_private]
    delta = min(
        (item.plan.delta for item in private), default=default_delta(items[0].plan.n_records)
    )
    selections: set[tuple[str, DpEvent, int]] = set()
    events = []
    for item in private:
        for stage, event, count in plan_events(item.plan):
            if stage == "selection":
                selections.update((name, event, count) for name in selection_names(item, out))
            else:
                events.append((event, count))
    events += [(event, count) for _, event, count in selections]
    return Total(
        data=name,
        runs=len(private),
        selecting=sum(item.plan.selection is not None for item in private),
        selections=len(selections),
        epsilon=compose_epsilon(events, delta, accountant="pld"),
        delta=delta,
        summed=sum(item.plan.composed_epsilon for item in private),
        summed_delta=sum(item.plan.delta for item in private),
        non_private=len(items) - len(private),
        seeded=sum(item.cell.config.privacy.reproducible_seed is not None for item in private),
    )


def total_text(total: Total) -> str:
    """The total in words."""
    text = (
        f"{total.data}: all {total.runs} private runs together cost each training image ε = {total.epsilon:.4g} at δ = "
        f"{total.delta:.3g} (PLD; basic composition: {total.summed:.4g} at {total.summed_delta:.3g})"
    )
    if total.selections < total.selecting:
        releases = (
            "one selection release"
            if total.selections == 1
            else f"{total.selections} selection releases"
        )
        text += f"; {total.selecting} of them share {releases}, counted once"
    if total.non_private:
        text += f"; {total.non_private} more use no noise: with them released there is no guarantee"
    if total.seeded:
        text += f"; the noise of {total.seeded} is seeded, for research, not for release"
    return text


WHO_PAYS = (
    "The total is what is paid when all these runs are released, or one is chosen by looking at them all; a single run, "
    "fixed beforehand, pays its own ε."
)


def guessed_seconds(config: RunConfig, plan: PrivacyPlan) -> float:
    """Seconds of one run from rates of another machine: the order of magnitude, no more.

    Of two cores where the model is bundled, else of the paper's four A6000s.
    """
    costs = shipped_costs()["cpu2" if (BUNDLED_DIR / config.model.path).is_dir() else "a6000"]
    return (
        3600 * estimate_on(config, plan, Cluster(name="", count=costs.devices, costs=costs)).hours
    )


# Bytes of (a synthetic image, a record's latent moments): bundled models at 32 px, others at
# Stable Diffusion's 512 px.
_BYTES: tuple[tuple[float, float], tuple[float, float]] = ((4e3, 1e4), (4e5, 8 * 64 * 64 * 4.0))


def disk_bytes(item: PlannedCell) -> float:
    """What one run writes, about: its images, and latents where it trains."""
    image, record = _BYTES[0 if (BUNDLED_DIR / item.cell.config.model.path).is_dir() else 1]
    return image * item.cell.config.synthesis.n_images + (
        record * item.plan.n_records if item.plan.finetune is not None else 0.0
    )


def check_disk(todo: Sequence[PlannedCell], out: Path) -> str | None:
    """A warning where the disk will not hold all of the cells, about.

    Raises:
        SapfError: It does not hold the largest one.
    """
    if not todo:
        return None
    place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free, sizes = shutil.disk_usage(place).free, {item.cell.name: disk_bytes(item) for item in todo}
    name, largest = max(sizes.items(), key=lambda pair: pair[1])
    if free < largest:
        raise SapfError(
            f"--out {out}: cell {name} writes about {largest / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        )
    total = sum(sizes.values())
    if free < total:
        return f"{out}: the grid writes about {total / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB free"
    return None


@dataclass(frozen=True)
class Estimate:
    """Seconds of one cell, and where they come from: ``measured`` (this very cell), ``like it`` or
    ``guess``.
    """

    seconds: float
    source: str


def estimate(planned: Sequence[PlannedCell], out: Path) -> dict[str, Estimate]:
    """Time of each cell by name, from the runs of ``out`` that are done.

    Runs of the same model and data set that have the guess's order of magnitude wrong have it wrong
    alike, so a cell without a run is the guess times the median of measured over guessed.
    """
    guesses = {item.cell.name: guessed_seconds(item.cell.config, item.plan) for item in planned}
    measured: dict[str, float] = {}
    ratios: dict[str, list[float]] = {}
    for item in planned:
        seconds = measured_seconds(out / item.cell.name)
        if seconds is not None:
            measured[item.cell.name] = seconds
            ratios.setdefault(_kind(item.cell.config), []).append(seconds / guesses[item.cell.name])
    found = {}
    for item in planned:
        name = item.cell.name
        alike = sorted(ratios.get(_kind(item.cell.config), []))
        if name in measured:
            found[name] = Estimate(measured[name], "measured")
        elif alike:
            found[name] = Estimate(guesses[name] * alike[len(alike) // 2], "like it")
        else:
            found[name] = Estimate(guesses[name], "guess")
    return found


def _kind(config: RunConfig) -> str:
    return config_hash(config, "model", "data")


def measured_seconds(directory: Path) -> float | None:
    """Seconds of a finished run, all stages; None where it is not finished."""
    run = RunDirectory(directory)
    if not run.metrics.exists():
        return None
    seconds = run.read_json(run.metrics).get("seconds", {})
    return float(
        sum(
            value
            for value in seconds.values()
            if isinstance(value, (int, float)) and math.isfinite(value)
        )
    )


def is_finished(cell: Cell, out: Path) -> bool:
    """Whether the cell's run is complete in ``out``.

    Raises:
        SapfError: Its directory holds a run with another config.
    """
    run = RunDirectory(out / cell.name)
    if not run.config.exists():
        return False
    try:
        run.check_same(cell.config)
    except SapfError as error:
        raise SapfError(f"cell {cell.name}: {error}") from error
    return run.metrics.exists() and run.card.exists()
