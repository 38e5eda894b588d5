"""Tables for people at a terminal: what can be named, and the core's results.

Light to import, for ``sapf methods`` and its like print tables too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from sapf_ray.data.catalog import DATA_SETS, datasets_json
from sapf_ray.data.known_set import KnownSet
from sapf_ray.methods import METHODS, methods_json
from sapf_ray.models.catalog import PUBLIC_MODELS, models_json
from sapf_ray.privacy.accountant_table import ACCOUNTANTS

if TYPE_CHECKING:
    from sapf_ray.estimate.result import Cluster, RunEstimate, StageEstimate
    from sapf_ray.privacy.ledger import Ledger, LedgerEvent
    from sapf_ray.privacy.planner import PrivacyPlan, StagePlan
    from sapf_ray.runs.together import Together
    from sapf_ray.verify.checks import Finding


def methods_table() -> Table:
    """The methods, as ``sapf methods`` prints them."""
    table = Table("method", "what", "in the paper")
    table.add_column("sets", overflow="fold")
    for name, row in METHODS.items():
        title = row.title if row.private else f"{row.title} (NOT PRIVATE)"
        sets = "\n".join(f"{key}={value}" for key, value in row.overrides.items())
        table.add_row(name, title, row.source, sets)
    return table


def datasets_table() -> Table:
    """The known data sets, as ``sapf datasets`` prints them."""
    table = _catalog_table("data.source", "data set")
    for row in DATA_SETS.values():
        lines = [
            ": ".join(filter(None, (row.title, _sizes(row)))),
            row.path and f"data.path: {row.path}",
            row.url and f"from: {row.url}",
            row.licence and f"terms: {row.licence}",
            row.notes,
            "options: " * bool(row.options) + ", ".join(f"data.{key}" for key in row.options),
        ]
        table.add_row(row.name, "\n".join(filter(None, lines)))
    return table


def models_table() -> Table:
    """The known public models, as ``sapf models`` prints them."""
    table = _catalog_table("model.path", "model")
    for row in PUBLIC_MODELS.values():
        facts = (
            row.architecture,
            f"{row.parameters:g} M parameters",
            f"{row.resolution} px",
            f"conditioned on {row.conditioning}",
            f"predicts {row.prediction}",
        )
        lines = [
            row.title,
            ", ".join(facts),
            f"from: {row.obtain}",
            f"terms: {row.licence}",
            row.notes,
        ]
        table.add_row(row.name, "\n".join(filter(None, lines)))
    return table


def _catalog_table(key: str, what: str) -> Table:
    """Two columns that keep addresses unbroken, and are readable from 80 characters on."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    table.add_column(key, no_wrap=True, style="bold")
    table.add_column(what, overflow="fold")
    return table


def _sizes(row: KnownSet) -> str:
    if row.n_train is None:
        return ""
    parts = [f"{len(row.class_names)} classes", f"{row.n_train:,} train"]
    if row.n_val:
        parts.append(f"{row.n_val:,} val (unused)")
    parts.append(f"{row.n_test:,} test")
    parts.append(f"{row.resolution} px")
    return ", ".join(parts)


def plan_table(plan: PrivacyPlan) -> Table:
    """The privacy plan, as ``sapf plan`` prints it."""
    from sapf_ray.privacy.planner import GROUNDING_STAGES

    spent = f"{plan.composed_epsilon:.4f}"
    if plan.non_private and plan.reads_images:
        spent = "infinite, NOT PRIVATE"
    batch = ""
    if plan.finetune is not None:
        batch = f"; expected batch size {plan.batch_size:,}"
    table = Table(
        title=f"Privacy plan: ε = {plan.epsilon:g} at δ = {plan.delta:.3g}, "
        f"{plan.neighbours.verb} one of {plan.n_records:,} {plan.unit}s",
        caption=f"composes to ε = {spent} ({plan.accountant.upper()}){batch}",
    )
    table.add_column("stage")
    for name in ("releases", "sample rate", "noise multiplier", "share of the budget"):
        table.add_column(name, justify="right")
    stages = [("selection", plan.selection), ("fine-tuning", plan.finetune)]
    grounding = [(name.value, getattr(plan, name)) for name in GROUNDING_STAGES]
    stages = [(name, stage) for name, stage in grounding if stage is not None] + stages
    if plan.evolution is not None:
        stages = [("evolution", plan.evolution)]
    nothing = "no release: the choice reads no sensitive image"
    if plan.steps == 0:
        nothing = "reads no sensitive image"
    for name, stage in stages:
        cells = ["0", "-", "-", nothing] if stage is None else _stage_cells(stage)
        table.add_row(name, *cells)
    return table


def person_line(person: Mapping[str, Any]) -> str:
    """What an image-level plan promises a person, from
    :func:`sapf_ray.privacy.group_privacy.person_report`.
    """
    epsilon = float(person["epsilon"])
    return (
        f"a person with {person['images']:,} images: ε = {epsilon:.4g} at the same δ, by group "
        "privacy of these releases; data.groups plans for persons (docs/person-level.md)"
    )


def _stage_cells(stage: StagePlan) -> list[str]:
    return [
        f"{stage.count:,}",
        f"{stage.sample_rate:.6g}",
        f"{stage.noise_multiplier:.4g}",
        "-" if stage.share is None else f"{stage.share:.2%}",
    ]


def ledger_table(ledger: Ledger) -> Table:
    """What a run spent, as ``sapf ledger`` prints it: a row for each kind of event, then all."""
    from sapf_ray.privacy.events import describe_event

    plan = ledger.plan
    table = Table(title=f"{ledger.path}: δ = {plan.delta:.3g}, planned ε = {plan.epsilon:g}")
    for name in ("stage", "event"):
        table.add_column(name)
    accountants = [f"ε ({accountant.title})" for accountant in ACCOUNTANTS.values()]
    for name in ("charged", "replays", *accountants):
        table.add_column(name, justify="right")
    lines = ledger.events()
    for stage, event in dict.fromkeys((line.stage, line.event) for line in lines):
        same = [line for line in lines if (line.stage, line.event) == (stage, event)]
        table.add_row(stage, describe_event(event), *_spent_cells(same, plan.delta))
    table.add_section()
    table.add_row("all", "", *_spent_cells(lines, plan.delta), style="bold")
    return table


def together_table(totals: Sequence[Together]) -> Table:
    """What runs on the same images cost together, as ``sapf ledger`` prints it for several."""
    table = Table(title="Runs on the same images, together")
    for name in ("images", "runs"):
        table.add_column(name, overflow="fold")
    for name in ("releases", "ε in all", "δ", "sum of the runs' ε"):
        table.add_column(name, justify="right")
    for total in totals:
        table.add_row(*_together_cells(total))
    notes = []
    if any(total.repeated for total in totals):
        notes.append("- a release that several ledgers paid for is counted once")
    if not all(total.comparable for total in totals):
        notes.append(
            "- rows with ? have no fingerprint, or one under another secret: their images may be "
            "those of another row, which adds up then"
        )
    if any(run.seeded for total in totals for run in total.runs):
        notes.append("- with seeded noise (*) there is no guarantee against who knows the seed")
    if len({total.unit for total in totals}) > 1:
        notes.append("- ε for an image and ε for a group do not add up: their neighbours differ")
    table.caption = "\n".join(notes) or None
    table.caption_justify = "left"
    return table


def _together_cells(total: Together) -> list[str]:
    images = "not known" if total.images is None else total.images.rpartition("/")[2][:12]
    mark = "" if total.comparable else " ?"
    names = [run.directory.root.name + "*" * run.seeded for run in total.runs]
    title = ACCOUNTANTS[total.accountant].title
    return [
        f"{images}{mark}, one {total.unit}",
        f"{len(names):,}: {', '.join(names)}",
        f"{total.releases:,}",
        f"{total.epsilon:.4f} ({title})",
        f"{total.delta:.3g}",
        f"{total.summed:.4f} at {total.summed_delta:.3g}",
    ]


def _spent_cells(lines: list[LedgerEvent], delta: float) -> list[str]:
    """Number of charges, number of replays, and what each accountant makes of the charges."""
    from sapf_ray.privacy.accountants import epsilon_text

    charged = Counter(line.event for line in lines if not line.replay)
    epsilons = [epsilon_text(charged.items(), delta, accountant=name) for name in ACCOUNTANTS]
    replays = sum(line.replay for line in lines)
    return [f"{sum(charged.values()):,}", f"{replays:,}", *epsilons]


def findings_table(directory: str, findings: Sequence[Finding]) -> Table:
    """The checks of ``sapf verify``, a row each."""
    from sapf_ray.verify.checks import FAIL, holds

    caption = "everything holds" if holds(findings) else "NOT everything holds"
    table = Table(title=f"sapf verify {directory}", caption=caption)
    for name in ("check", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for row in findings:
        state = f"[bold red]{row.state}[/]" if row.state == FAIL else row.state
        table.add_row(row.check, state, escape(row.detail))
    return table


def estimate_table(estimate: RunEstimate) -> Table:
    """Time, memory and cost of each stage, as ``sapf plan --cluster`` prints them."""
    cluster = estimate.cluster
    table = Table(
        title=f"{cluster.count} x {cluster.costs.title}: about {_time(estimate.hours)}",
        caption="\n".join(f"- {note}" for note in estimate.notes),
        caption_justify="left",
    )
    table.add_column("stage")
    for name in ("work", "a unit", "time", "GB a device"):
        table.add_column(name, justify="right")
    if cluster.price is not None:
        table.add_column("cost", justify="right")
    for name, stage in estimate.stages.items():
        table.add_row(name, *_work_cells(stage, cluster))
    start = cluster.costs.start_seconds / 3600
    if start:
        table.add_row("start and end", "", "", *_time_cells(cluster, start))
    total = _time_cells(cluster, estimate.hours)
    table.add_row("in all", "", "", *total)
    return table


def _work_cells(stage: StageEstimate, cluster: Cluster) -> list[str]:
    each = "-"
    if stage.seconds_per_unit is not None:
        each = f"{1000 * stage.seconds_per_unit:.3g} ms"
    memory = "-"
    if stage.memory_gb is not None:
        memory = f"{stage.memory_gb:.1f}"
    times = _time_cells(cluster, stage.hours, memory=memory)
    return [f"{stage.units:,.0f} {stage.unit}", each, *times]


def _time_cells(cluster: Cluster, hours: float | None, *, memory: str = "") -> list[str]:
    """Time, memory, and the cost where there is a price.

    Args:
        cluster: The devices.
        hours: Wall time; None where it was not measured.
        memory: Text of the column for memory.
    """
    time = "not measured" if hours is None else _time(hours)
    if cluster.price is None:
        return [time, memory]
    cost = cluster.cost(hours)
    return [time, memory, "-" if cost is None else f"{cost:,.2f}"]


def _time(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:,.1f} h"
    if hours >= 1 / 60:
        return f"{60 * hours:.1f} min"
    return f"{3600 * hours:.0f} s"


LISTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[], Table]]] = {
    "datasets": (datasets_json, datasets_table),
    "methods": (methods_json, methods_table),
    "models": (models_json, models_table),
}
"""Command to the rows that it lists, as JSON and as a table."""
