"""What a grid will spend, known before any of it starts.

Each cell's privacy plan and the total per data set. The total composes the plans of all
cells that read the same images (design rule 7): whoever sees all the results, or one result that
was picked after looking at all, has seen every release. Cells with noise from fresh keys are
independent mechanisms, so their events simply compose. A selection release that several cells use
(same key, same noise: :mod:`sapf_ray.saliency.shared`) is one mechanism, and the fine-tunings that
start from it are adaptive: it composes once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import DataConfig, GroundingConfig, ModelConfig, RunConfig
from sapf_ray.data.base import open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import SapfError
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.models.facts import find_facts
from sapf_ray.models.location import resolve_model
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, default_delta, make_plan, plan_events
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.shared import released_by, shared_folder
from sapf_ray.stages import Stage
from sapf_ray.tune.space import Cell

SELECTION_FOLDER = ".selections"  # in a grid's directory

WHO_PAYS = (
    "The total is what is paid when all these runs are released, or one is chosen by looking at "
    "them all; a single run, fixed beforehand, pays its own ε."
)


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its privacy plan."""

    cell: Cell
    plan: PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class Total:
    """What all cells on one data set spend together.

    Attributes:
        data: ``data.source``, with the path and the grouping where there is one.
        unit: Whom the epsilons are for: one ``image``, or one ``group``.
        runs: Number of cells that read its images, with noise.
        selecting: Number of those of them with a private selection.
        selections: Number of selections that they make; fewer where cells share one.
        epsilon: Their composition under PLD, at ``delta``.
        delta: The smallest of their deltas.
        summed: Sum of their epsilons (basic composition), at ``summed_delta``.
        summed_delta: Sum of their deltas.
        non_private: Number of cells that read its images without noise: with these released as
            well there is no guarantee.
        seeded: Number of cells whose noise can be repeated by whoever knows the seed: no guarantee
            against them.
    """

    data: str
    unit: str
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
    return source.n_units, tuple(source.prompts)


@functools.lru_cache(maxsize=32)
def _facts(data: DataConfig, model: ModelConfig, grounding: GroundingConfig) -> Facts | None:
    """What remedies are chosen from; None where the images or the model are missing."""
    try:
        config = RunConfig(data=data, model=model, grounding=grounding)
        return find_facts(config, open_source(data)).facts
    except SapfError:
        return None


def _n_records(data: DataConfig, *, strict: bool) -> int:
    """N, from the images where they are.

    Else (unless ``strict``) the declared or the published number.
    """
    try:
        n, _ = _shape(data)
        return n
    except SapfError:
        row = DATA_SETS.get(data.source)
        published = row.n_train if row and data.groups is None else None
        known = data.n_records or published
        if strict or known is None:
            raise
        return known


def plan_cells(cells: Sequence[Cell], *, strict: bool = False) -> list[PlannedCell]:
    """Plans every cell; reads no image.

    Args:
        cells: The cells.
        strict: Data sets and models must be there and candidate pools not empty, as before a
            start; without, published sizes serve where images are missing.

    Raises:
        SapfError: Epsilon cannot be met, data is missing, and the like; names the cell and the
            field.
    """
    planned = []
    for cell in cells:
        config = cell.config
        try:
            plan = make_plan(
                config,
                _n_records(config.data, strict=strict),
                facts=_facts(config.data, config.model, config.grounding),
            )
            check_evaluation(config.evaluation)
            if strict:
                _check_model(config, plan)
        except SapfError as error:
            raise SapfError(f"cell {cell.name}: {error}") from error
        planned.append(PlannedCell(cell, plan))
    return planned


def _check_model(config: RunConfig, plan: PrivacyPlan) -> None:
    """A local model is there, knows the classes and has the pool.

    A hub id is left to its first run.
    """
    if not Path(resolve_model(config.model)).is_dir():
        return
    model = PublicModel.open(config.model)
    _, prompts = _shape(config.data)
    model.check_classes(prompts)
    check_evaluation(config.evaluation, made=config.synthesis.side(model.resolution))
    if plan.finetune is not None:
        model.pool(config.saliency.pool)


def selection_root(config: RunConfig, out: Path) -> Path:
    """Where the cells of a grid keep the selection releases that they share."""
    if config.cluster.selection_dir:
        return Path(config.cluster.selection_dir)
    return (out / SELECTION_FOLDER).resolve()


def selection_names(item: PlannedCell, out: Path) -> set[str]:
    """Names of the cell's selection releases; cells that share a name share the release.

    The ledger has them if the cell has paid for its selection. Other cells will use the shared
    release: the one that is there, or the one that the first of them makes.
    """
    if item.plan.selection is None:
        return set()
    config = item.cell.config
    run = RunDirectory(out / item.cell.name)
    if run.ledger.exists():
        events = Ledger.open(run.ledger).events()
        paid = {event.drawn_by for event in events if event.stage == Stage.SELECTION}
        if paid:
            return paid
    folder = shared_folder(selection_root(config, out), config, plan=item.plan)
    return {released_by(folder) or str(folder)}


def totals(planned: Iterable[PlannedCell], out: Path) -> list[Total]:
    """One line per data set whose images some cell reads, and per unit of privacy.

    Runs for one image and runs for one group do not add up: of either, the other's epsilon says
    nothing of this kind of neighbour.

    Args:
        planned: The cells.
        out: Directory of the grid's runs: which selections are shared is read from what is there.
    """
    groups: dict[str, list[PlannedCell]] = {}
    for item in planned:
        if item.plan.reads_images:
            data = item.cell.config.data
            name = f"{data.source} ({data.path})" if data.path else data.source
            if data.groups is not None:
                name += f" by {data.groups}"
            groups.setdefault(name, []).append(item)
    return [_total(name, items, out=out) for name, items in groups.items()]


def _total(
    name: str,
    items: list[PlannedCell],
    *,
    out: Path,
) -> Total:
    private = [item for item in items if not item.plan.non_private]
    deltas = [item.plan.delta for item in private]
    delta = min(deltas, default=default_delta(items[0].plan.n_records))
    selections: set[tuple[str, DpEvent, int]] = set()
    events = []
    for item in private:
        for stage, event, count in plan_events(item.plan):
            if stage == Stage.SELECTION:
                for selection in selection_names(item, out):
                    selections.add((selection, event, count))
            else:
                events.append((event, count))
    events += [(event, count) for _, event, count in selections]
    seeds = [item.cell.config.privacy.reproducible_seed for item in private]
    return Total(
        data=name,
        unit=items[0].plan.unit,
        runs=len(private),
        selecting=sum(item.plan.selection is not None for item in private),
        selections=len(selections),
        epsilon=compose_epsilon(events, delta, accountant="pld"),
        delta=delta,
        summed=sum(item.plan.composed_epsilon for item in private),
        summed_delta=sum(deltas),
        non_private=len(items) - len(private),
        seeded=sum(seed is not None for seed in seeds),
    )


def total_text(total: Total) -> str:
    """The total in words."""
    text = (
        f"{total.data}: all {total.runs} private runs together cost each training {total.unit} "
        f"ε = {total.epsilon:.4g} at δ = {total.delta:.3g} "
        f"(PLD; basic composition: {total.summed:.4g} at {total.summed_delta:.3g})"
    )
    if total.selections < total.selecting:
        releases = f"{total.selections} selection releases"
        if total.selections == 1:
            releases = "one selection release"
        text += f"; {total.selecting} of them share {releases}, counted once"
    if total.non_private:
        text += f"; {total.non_private} more use no noise: with them released there is no guarantee"
    if total.seeded:
        text += f"; the noise of {total.seeded} is seeded, for research, not for release"
    return text


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
