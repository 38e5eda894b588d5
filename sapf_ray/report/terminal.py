"""What a run shows in the terminal: progress bars while it works, one table at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sapf_ray.evaluation.metrics import headline, shown

if TYPE_CHECKING:
    from sapf_ray.pipeline import Result


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (stage, done, total); one bar per stage."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield update


def result_table(result: Result) -> Table:
    """Epsilon spent against planned, scores, times, and where things are."""
    metrics = result.metrics
    table = _two_columns(f"sapf run {result.directory.home}")
    if result.verdict:
        table.title = f"{result.directory.home}, made from the finished run"
    spent = _epsilon(metrics["epsilon_spent"])
    planned = _epsilon(metrics["epsilon_planned"])
    table.add_row(
        "ε spent / planned",
        f"{spent} / {planned}  (δ = {metrics['delta']:.3g}, add/remove one image)",
    )
    if result.plan.non_private and result.plan.reads_images:
        table.add_row("", "[bold red]NOT PRIVATE: sensitive images were used without noise[/]")
    _add_scores(table, metrics)
    table.add_row("seconds", _seconds(metrics["seconds"]))
    table.add_row("orchestration", _orchestration(metrics["orchestration"]))
    for name, place in _places(result).items():
        table.add_row(name, place)
    return table


def score_table(title: str, scores: Mapping[str, float]) -> Table:
    """Scores alone."""
    table = _two_columns(title)
    _add_scores(table, scores)
    return table


def _two_columns(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def _add_scores(table: Table, metrics: Mapping[str, Any]) -> None:
    for name, metric in headline().items():
        if name in metrics:
            table.add_row(metric.title, shown(name, metrics[name]))


def _epsilon(value: float | str) -> str:
    """JSON has no infinity: a non-private run's epsilon is the string ``inf``."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}"


def _seconds(stages: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items())


def _orchestration(cost: Mapping[str, float]) -> str:
    stages = dict(cost)
    share = stages.pop("total_share")
    outside = stages.pop("outside_stages")
    parts = _seconds({**stages, "outside the stages": outside})
    return f"{share:.0%} of the run, in seconds: {parts}"


def _places(result: Result) -> dict[str, str]:
    """What was written, and where."""
    directory = result.directory
    adapter = "none"
    if directory.adapter.exists():
        adapter = f"{directory.adapter}/  (pipe.load_lora_weights)"
    places = {"synthetic data set": f"{directory.synthetic}/  (Parquet)"}
    if directory.sample_grid.exists():  # scores alone draw none
        places["pictures"] = str(directory.sample_grid)
    places |= {
        "adapter": adapter,
        "privacy card": str(directory.card),
    }
    uri = result.tracking_uri
    if uri and uri.startswith("http"):
        places["MLflow"] = uri
    elif uri:
        places["MLflow"] = f"mlflow ui --backend-store-uri {uri}"
    return places
