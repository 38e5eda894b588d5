"""What a grid will spend, known before any of it starts.

Each cell's privacy plan and the total per data set. The total composes the plans of all cells that
read the same images, and what other runs in the grid's directory paid (design rule 7): whoever sees
all the results, or one result that was picked after looking at all, has seen every release. Cells
with noise from fresh keys are independent mechanisms, so their events simply compose. A selection
release that several cells use (same key, same noise: :mod:`sapf_ray.saliency.shared`) is one
mechanism, and the fine-tunings that start from it are adaptive: it composes once.
"""

from __future__ import annotations

import functools
from collections import Counter
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
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.facts import Facts, default_delta
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan, plan_events
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.together import PaidRun, charged_releases, tightest
from sapf_ray.saliency.shared import released_by, shared_folder
from sapf_ray.stages import Stage
from sapf_ray.tune.space import Cell
from sapf_ray.tune.twin import FOLDER

SELECTION_FOLDER = ".selections"  # in a grid's directory

WHO_PAYS = (
    "The total is what is paid when all these runs are released, or one is chosen by looking at "
    "all their images; a single run, fixed beforehand, pays its own ε. The scores beside them are "
    "unprotected measurements of real images: of test images, which no ε here covers, and with "
    "evaluation.fid_reference: train of the training images too; then no ε covers a choice by them."
)


Selections = set[tuple[str, DpEvent, int]]
"""Name of who drew a selection release, its event, and how often."""


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
        earlier: Number of those runs that are in the grid's directory, but not among its cells as
            they are planned now: they were paid all the same.
        accountant: The tightest that can price all the releases.
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
    earlier: int = 0
    accountant: str = "pld"


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
        out: Directory of the grid's runs. What is there says which selections are shared, and what
            was paid by runs that are not among the cells any more: a grid that is cut down to its
            winner costs what it cost.
    """
    names: dict[tuple[str, ...], str] = {}
    groups: dict[tuple[str, ...], list[PlannedCell]] = {}
    earlier: dict[tuple[str, ...], list[PaidRun]] = {}
    planned = list(planned)
    for item in planned:
        if item.plan.reads_images:
            data = item.cell.config.data
            key = _images(data.source, data.path, groups=data.groups)
            names.setdefault(key, _name(data.source, data.path, groups=data.groups))
            groups.setdefault(key, []).append(item)
    for run in _not_planned(planned, out):
        given = [run.setting("data", name) for name in ("source", "path", "groups")]
        key = _images(given[0], given[1], groups=given[2])
        names.setdefault(key, _name(given[0], given[1], groups=given[2]))
        earlier.setdefault(key, []).append(run)
    return [
        _total(name, groups.get(key, []), earlier=earlier.get(key, []), out=out)
        for key, name in names.items()
    ]


def _name(source: str, path: str | None, *, groups: str | None) -> str:
    """What a data set and a unit of privacy are called in a total."""
    name = f"{source} ({path})" if path else source
    return name if groups is None else f"{name} by {groups}"


def _images(source: str, path: str | None, *, groups: str | None) -> tuple[str, ...]:
    """Equal for the same files under another path, such as a link, and the same unit."""
    place = str(Path(path).expanduser().resolve()) if path else ""
    return (str(source), place, str(groups))


def _not_planned(planned: Sequence[PlannedCell], out: Path) -> list[PaidRun]:
    """Runs in the grid's directory that paid, and are not among today's cells: the grid was cut
    down, or edited.
    """
    cells = {item.cell.name for item in planned}
    found = []
    for path in sorted(out.glob("*/ledger.jsonl")):
        if path.parent.name in cells:
            continue
        run = PaidRun(RunDirectory(path.parent), Ledger.open(path))
        place = run.setting("data", "path")
        on_twin = place is not None and FOLDER in Path(place).parts
        if run.ledger.plan.reads_images and not on_twin:
            found.append(run)
    return found


def _spend(item: PlannedCell, out: Path) -> tuple[Selections, Counter[DpEvent]]:
    """A cell's selection releases, and its other events: what it plans, or paid where that is
    more.
    """
    selections: Selections = set()
    events: Counter[DpEvent] = Counter()
    for stage, event, count in plan_events(item.plan):
        if stage == Stage.SELECTION:
            selections |= {(name, event, count) for name in selection_names(item, out)}
        else:
            events[event] += count
    ledger = RunDirectory(out / item.cell.name).ledger
    if ledger.exists():
        events |= _paid(Ledger.open(ledger))[1]
    return selections, events


def _paid(ledger: Ledger) -> tuple[Selections, Counter[DpEvent]]:
    """Selection releases that a ledger paid for, and its other charged events."""
    if ledger.plan.repeat is not None:  # the winner of a private choice pays for all its trials
        return set(), charged_releases([ledger])[0]
    selections: Counter[tuple[str, DpEvent]] = Counter()
    events: Counter[DpEvent] = Counter()
    for line in ledger.events():
        if line.replay:
            continue
        if line.stage == Stage.SELECTION:
            selections[line.drawn_by, line.event] += 1
        else:
            events[line.event] += 1
    return {(name, event, count) for (name, event), count in selections.items()}, events


def _total(
    name: str,
    items: list[PlannedCell],
    *,
    earlier: list[PaidRun],
    out: Path,
) -> Total:
    private = [item for item in items if not item.plan.non_private]
    paid = [run for run in earlier if not run.ledger.plan.non_private]
    plans = [*(item.plan for item in private), *(run.ledger.plan for run in paid)]
    spent = [item.plan.composed_epsilon for item in private]
    spent += [run.ledger.epsilon_spent() for run in paid]
    selections: Selections = set()
    events: Counter[DpEvent] = Counter()
    for more, others in [
        *(_spend(item, out) for item in private),
        *(_paid(run.ledger) for run in paid),
    ]:
        selections |= more
        events += others
    for _, event, count in selections:
        events[event] += count
    seeds = [item.cell.config.privacy.reproducible_seed is not None for item in private]
    deltas = [plan.delta for plan in plans]
    any_plan = items[0].plan if items else earlier[0].ledger.plan
    delta = min(deltas, default=default_delta(any_plan.n_records))
    accountant = tightest(events)
    return Total(
        data=name,
        unit=any_plan.unit,
        runs=len(plans),
        selecting=sum(plan.selection is not None for plan in plans),
        selections=len(selections),
        epsilon=compose_epsilon(events.items(), delta, accountant=accountant),
        delta=delta,
        summed=sum(spent),
        summed_delta=sum(deltas),
        non_private=len(items) + len(earlier) - len(plans),
        seeded=sum(seeds) + sum(run.seeded for run in paid),
        earlier=len(paid),
        accountant=accountant,
    )


def total_text(total: Total) -> str:
    """The total in words."""
    text = (
        f"{total.data}: all {total.runs} private runs together cost each training {total.unit} "
        f"ε = {total.epsilon:.4g} at δ = {total.delta:.3g} "
        f"({ACCOUNTANTS[total.accountant].title}; basic composition: {total.summed:.4g} at "
        f"{total.summed_delta:.3g})"
    )
    if total.earlier:
        text += f"; {total.earlier} of them ran here before, and are not among today's cells"
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
