"""Tables of the core's results, for people at a terminal."""

from __future__ import annotations

from rich.table import Table

from sapf_ray.privacy.planner import PrivacyPlan, StagePlan


def plan_table(plan: PrivacyPlan) -> Table:
    """The privacy plan, as ``sapf plan`` prints it."""
    spent = f"{plan.composed_epsilon:.4f}"
    if plan.non_private and plan.reads_images:
        spent = "infinite, NOT PRIVATE"
    batch = ""
    if plan.finetune is not None:
        batch = f"; expected batch size {plan.batch_size:,}"
    table = Table(
        title=f"Privacy plan: ε = {plan.epsilon:g} at δ = {plan.delta:.3g}, "
        f"add/remove one of {plan.n_records:,} images",
        caption=f"composes to ε = {spent} ({plan.accountant.upper()}){batch}",
    )
    table.add_column("stage")
    for name in ("releases", "sample rate", "noise multiplier", "share of the budget"):
        table.add_column(name, justify="right")
    stages = [("selection", plan.selection), ("fine-tuning", plan.finetune)]
    if plan.evolution is not None:
        stages = [("evolution", plan.evolution)]
    nothing = "no release: the choice reads no sensitive image"
    if plan.steps == 0:
        nothing = "reads no sensitive image"
    for name, stage in stages:
        cells = ["0", "-", "-", nothing] if stage is None else _stage_cells(stage)
        table.add_row(name, *cells)
    return table


def _stage_cells(stage: StagePlan) -> list[str]:
    return [
        f"{stage.count:,}",
        f"{stage.sample_rate:.6g}",
        f"{stage.noise_multiplier:.4g}",
        "-" if stage.share is None else f"{stage.share:.2%}",
    ]
