"""What a run shows in the terminal: progress bars while it works, one table at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

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
    """Epsilon spent against planned, scores, times, and where things lie."""
    metrics, directory = result.metrics, result.directory
    table = Table(title=f"sapf run {directory.root}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    spent, planned = metrics["epsilon_spent"], metrics["epsilon_planned"]

    def number(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:.4g}"

    table.add_row(
        "ε spent / planned",
        f"{number(spent)} / {number(planned)}  (δ = {metrics['delta']:.3g}, add/remove one image)",
    )
    if result.plan.non_private and result.plan.reads_images:
        table.add_row("", "[bold red]NOT PRIVATE: sensitive images were used without noise[/]")
    for name, metric in headline().items():
        if name in metrics:
            table.add_row(metric.title, shown(name, metrics[name]))
    table.add_row(
        "seconds",
        ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items()),
    )
    cost = dict(metrics["orchestration"])
    share, outside = cost.pop("total_share"), cost.pop("outside_stages")
    parts = [
        *(f"{stage} {seconds:.0f}" for stage, seconds in cost.items()),
        f"outside the stages {outside:.0f}",
    ]
    table.add_row("orchestration", f"{share:.0%} of the run, in seconds: " + ", ".join(parts))
    table.add_row("synthetic data set", f"{directory.synthetic}/  (Parquet)")
    table.add_row("pictures", str(directory.plots / "synthetic.png"))
    table.add_row(
        "adapter",
        f"{directory.adapter}/  (pipe.load_lora_weights)" if directory.adapter.exists() else "none",
    )
    table.add_row("privacy card", str(directory.card))
    if result.tracking_uri:
        table.add_row(
            "MLflow",
            f"mlflow ui --backend-store-uri {result.tracking_uri}"
            if not result.tracking_uri.startswith("http")
            else result.tracking_uri,
        )
    return table
