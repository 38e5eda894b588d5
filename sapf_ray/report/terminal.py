"""What a run shows: progress while it works, as bars in a terminal and as lines elsewhere, and one
table at its end.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
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
from sapf_ray.runs import stores
from sapf_ray.runs.directory import ResultDirectory

if TYPE_CHECKING:
    from sapf_ray.pipeline import Result


Update = Callable[[str, int, int], None]
"""Takes stage, units done and units in all; 0 in all where the stage does not count."""

LINE_SECONDS = 10.0
"""Longest time without a line where the output is no terminal."""


def show_progress(console: Console) -> contextlib.AbstractContextManager[Update]:
    """Bars in a terminal, lines elsewhere (files, pipes, job logs)."""
    if console.is_terminal:
        return progress_bars(console)
    return progress_lines(console)


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Update]:
    """Yields a callback; one bar per stage."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def end_uncounted() -> None:
            for task in progress.tasks:
                if task.total is None:
                    progress.update(task.id, total=1, completed=1)

        def update(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                end_uncounted()
                bars[stage] = progress.add_task(stage, total=total or None)
            if total:
                progress.update(bars[stage], completed=done, total=total)

        yield update
        end_uncounted()


@contextlib.contextmanager
def progress_lines(console: Console, *, every: float = LINE_SECONDS) -> Iterator[Update]:
    """Yields a callback; a line when a stage begins, and one at least every so many seconds.

    Args:
        console: Where the lines go.
        every: Longest time between two lines in seconds.
    """
    lines = _Lines(console, every)
    watcher = threading.Thread(target=lines.watch, daemon=True, name="progress")
    watcher.start()
    try:
        yield lines.update
    finally:
        lines.stopped.set()
        watcher.join()


class _Lines:
    """What was reported last, and when a line was last printed."""

    def __init__(self, console: Console, every: float) -> None:
        self.console = console
        self.every = every
        self.stopped = threading.Event()
        self.began = time.monotonic()
        self.printed = self.began
        self.stage = "starting"
        self.done = 0
        self.total = 0
        self._lock = threading.Lock()

    def update(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            is_new = stage != self.stage
            self.stage = stage
            self.done = done
            self.total = total
            if is_new:
                self._print()

    def watch(self) -> None:
        # looks more often than it prints: a stage's own lines count, too
        while not self.stopped.wait(self.every / 20):
            with (
                self._lock,
                contextlib.suppress(OSError),
            ):  # the reader is gone: the run's own error
                if time.monotonic() - self.printed >= 0.9 * self.every:
                    self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        minutes, seconds = divmod(int(self.printed - self.began), 60)
        done = f" {self.done:,}/{self.total:,}" if self.total else ""
        self.console.print(
            f"sapf: {minutes}:{seconds:02}  {self.stage}{done}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def result_table(result: Result) -> Table:
    """Epsilon spent against planned, scores, times, and where things are."""
    metrics = result.metrics
    table = _two_columns(f"sapf run {result.directory.home}")
    if isinstance(result.directory, ResultDirectory):
        table.title = f"{result.directory.home}, made from the finished run"
    spent = _epsilon(metrics["epsilon_spent"])
    planned = _epsilon(metrics["epsilon_planned"])
    table.add_row(
        "ε spent / planned",
        f"{spent} / {planned}  (δ = {metrics['delta']:.3g}, {result.plan.neighbours.short})",
    )
    answer = result.verdict.answer
    table.add_row("release", answer if result.verdict.release else f"[bold red]{answer}[/]")
    _add_scores(table, metrics)
    table.add_row("seconds", _seconds(metrics["seconds"]))
    table.add_row("orchestration", _orchestration(metrics["orchestration"]))
    for name, place in _places(result).items():
        table.add_row(name, place)
    return table


def manifest_line(result: Result) -> str:
    """What to keep elsewhere so that any later edit is found; outside the table, which would break
    the digest.
    """
    return f"SHA-256 of {result.directory.manifest}, for sapf verify: {result.manifest}"


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
        places["MLflow"] = stores.shown(uri)
    elif uri:
        places["MLflow"] = f"mlflow ui --backend-store-uri {shlex.quote(stores.shown(uri))}"
    return places
