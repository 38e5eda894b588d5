"""What ``sapf tune --private`` will spend, and what it refuses, before it touches an image.

Trials of a private choice must cost alike, whichever cell they draw: the price of the best of them
is that of one mechanism, repeated. So axes may change whatever does not change the events that are
paid for (learning rates, matrices, clipping, sampling), and no noise, batch, number of steps, data
or budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import config_hash, flatten, to_dict
from sapf_ray.config.section import require
from sapf_ray.errors import ConfigError, RunDirectoryError, SapfError
from sapf_ray.privacy.accountants import PLD_INTERVAL, compose_epsilon, supports
from sapf_ray.privacy.events import describe_event
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan, plan_events
from sapf_ray.privacy.repeat import NEGATIVE_BINOMIAL, Repeat
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.tune.budget import PlannedCell, plan_cells
from sapf_ray.tune.space import Cell, Overrides, Space, load_space, make_cells

ALIKE = ("data", "privacy", "tuning", "evaluation")
"""Sections that are the same in all cells: what is protected, how it is paid, what a score is."""

_INTERVAL = 10 * PLD_INTERVAL  # of comparisons: an upper bound, too, a fraction of a percent above


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A space among whose cells one is to be chosen privately.

    Attributes:
        space: The space file.
        planned: Its cells; all have the same plan.
        out: Holds the winner, and while the choice goes on a private folder.
    """

    space: Space
    planned: Sequence[PlannedCell]
    out: Path

    @property
    def plan(self) -> PrivacyPlan:
        """The plan of whichever trial."""
        return self.planned[0].plan

    @property
    def repeat(self) -> Repeat:
        """How trials are repeated."""
        assert self.plan.repeat is not None
        return self.plan.repeat


def open_choice(
    name: str,
    out: str | None = None,
    *,
    smoke: bool = False,
    overrides: Overrides | None = None,
    only: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Choice:
    """Reads a space and plans the choice; reads no image and writes nothing.

    Args:
        name: Name of the space, or its path.
        out: Directory of the choice; ``runs/<space>-private`` unless given.
        smoke: Apply the space's smoke block.
        overrides: Dotted config keys.
        only: Axis to label: choose among these cells only.
        strict: Data sets and models must be there.

    Raises:
        SapfError: One line that names the file, or the cell and the field.
    """
    space = load_space(name, smoke)
    directory = Path(out or f"runs/{space.name}-private").expanduser()
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"--out {directory}: is a file, must be a directory")
    if RunDirectory(directory).config.exists():
        raise RunDirectoryError(
            f"--out {directory}: is the directory of a single run; use another one"
        )
    private = {"tuning.private": True, "tuning.split": None}
    cells = make_cells(space, {**(overrides or {}), **private}, only=only)
    check_alike(cells)
    planned = plan_cells(cells, strict=strict)
    _check_events(planned)
    return Choice(space=space, planned=planned, out=directory)


def check_alike(cells: Sequence[Cell]) -> None:
    """Refuses cells that differ in what is protected, how it is paid or how it is scored.

    Raises:
        ConfigError: Names the key, and the cell that differs.
    """
    first, *others = cells
    settings = flatten(to_dict(first.config))
    for cell in others:
        for section in ALIKE:
            if config_hash(cell.config, section) == config_hash(first.config, section):
                continue
            for key, value in flatten(to_dict(cell.config)).items():
                require(
                    not key.startswith(f"{section}.") or value == settings[key],
                    key,
                    value,
                    f"must be {settings[key]!r} in cell {cell.name} as in {first.name}: all cells "
                    "of a private choice have the same images, budget and score",
                )


def _check_events(planned: Sequence[PlannedCell]) -> None:
    """Refuses cells whose trials would not cost alike."""
    first, *others = planned
    for item in others:
        for mine, theirs in zip(_stages(item.plan), _stages(first.plan), strict=True):
            if mine != theirs:
                raise SapfError(
                    f"cell {item.cell.name}: releases {mine or 'nothing'}, cell {first.cell.name} "
                    f"{theirs or 'nothing'}: trials of a private choice must cost alike; leave "
                    "axes of steps, batches, groups of matrices or noise out"
                )


def _stages(plan: PrivacyPlan) -> list[str]:
    """Each private stage's releases in words, empty where it has none."""
    words = {
        name: f"{count} x {describe_event(event)} in {name}"
        for name, event, count in plan_events(plan)
    }
    return [words.get(name, "") for name in PRIVATE_STAGES]


def plan_lines(choice: Choice) -> list[str]:
    """The plan in words: what the winner costs, and what other ways to choose would."""
    plan, repeat = choice.plan, choice.repeat
    charges = [(event, count) for _, event, count in plan_events(plan)]
    assert plan.finetune is not None and plan.score is not None
    noise = plan.score.noise_multiplier
    drawn = "Poisson"
    if repeat.distribution == NEGATIVE_BINOMIAL:
        drawn = f"negative binomial of shape {repeat.shape:g}"
    n = len(choice.planned)

    def epsilon(times: float, accountant: str) -> str:
        events = [(event, round(count * times)) for event, count in charges]
        if not supports(accountant, events):
            return "n/a"
        found = compose_epsilon(events, plan.delta, accountant=accountant, pld_interval=_INTERVAL)
        return f"{found:.4g}"

    return [
        f"a private choice among {n} cells: a secret number of trials, mean {repeat.mean:g} "
        f"({drawn}), each of a cell drawn at random",
        f"the winner costs ε = {plan.composed_epsilon:.4g} at δ = {plan.delta:.3g}, however many "
        f"trials there are; {plan.neighbours.doing} one {plan.unit}, by RDP",
        f"one trial alone would cost ε = {epsilon(1, 'rdp')} (by PLD {epsilon(1, 'pld')}); "
        f"fine-tuning's σ = {plan.finetune.noise_multiplier:.4g}",
        f"score: {repeat.held_out} of {plan.n_records + repeat.held_out} training {plan.unit}s are "
        f"held out, the number classified rightly has noise σ = {noise:.4g}: "
        f"{100 * noise / repeat.held_out:.2g} points of accuracy",
        f"for comparison, with the same noise: all {n} cells released cost ε = "
        f"{epsilon(n, 'rdp')} (PLD {epsilon(n, 'pld')}), {repeat.mean:g} of them "
        f"{epsilon(repeat.mean, 'rdp')} (PLD {epsilon(repeat.mean, 'pld')})",
    ]


def check_options(*, public_twin: bool, max_concurrent: int, retries: int) -> None:
    """Refuses options of ``sapf tune`` that a private choice does not heed.

    Raises:
        ConfigError: One of them is given.
    """
    if public_twin:
        raise ConfigError(
            "--private", True, "is not for --public_twin, where a choice costs nothing"
        )
    if max_concurrent not in (0, 1):
        raise ConfigError(
            "--max_concurrent", max_concurrent, "must be left out: trials run one by one"
        )
    require(retries >= 0, "--retries", retries, "must be at least 0")
