"""A run before it starts, in a few lines; and the commented file that ``sapf init`` writes."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

from sapf_ray.config.fields import section_titles
from sapf_ray.estimate.arithmetic import size_factor
from sapf_ray.estimate.local import Forecast, duration, forecast
from sapf_ray.estimate.machine import this_machine
from sapf_ray.privacy.planner import PRIVATE_STAGES
from sapf_ray.runs.clock import finished_stages

if TYPE_CHECKING:
    from sapf_ray.config import RunConfig
    from sapf_ray.data.base import ImageSource
    from sapf_ray.estimate.machine import Machine
    from sapf_ray.estimate.sizing import Choice, Sizing
    from sapf_ray.models.public_model import PublicModel
    from sapf_ray.privacy.planner import PrivacyPlan

LONG_SECONDS = 3600.0
"""From here on a run on cores is called long, with the remedy."""


def opening_lines(
    config: RunConfig,
    out: str,
    *,
    plan: PrivacyPlan,
    source: ImageSource,
    model: PublicModel,
) -> Iterator[str]:
    """What ``sapf run`` prints first.

    Args:
        config: The run.
        out: Its directory; what earlier starts finished there takes no time.
        plan: Its plan.
        source: The images, listed.
        model: The public model.
    """
    times = None
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        times = forecast(
            config,
            plan,
            machine=this_machine(),
            image_bytes=source.file_bytes(),
            factor=size_factor(model),
        ).without(finished_stages(out))
    yield from plan_lines(config, plan, times)


def plan_lines(config: RunConfig, plan: PrivacyPlan, times: Forecast | None) -> Iterator[str]:
    """What a run is about to do and spend.

    Args:
        config: The run.
        plan: Its plan.
        times: How long it will take on this machine; None where it runs elsewhere.
    """
    yield f"plan: {_budget(plan)}"
    yield f"plan: {_work(config, plan)}"
    if times is None:
        return
    yield f"plan: {times.words()}"
    if times.total > LONG_SECONDS and not times.on_gpus:
        yield (
            f"warning: {_work(config, plan)}: {duration(times.total)} without a GPU; for minutes "
            "interrupt it, and take the size that `sapf init PHOTOS/` finds, or --preset digits"
        )


def _budget(plan: PrivacyPlan) -> str:
    if not plan.reads_images:
        return f"{plan.n_records:,} {plan.unit}s, none of which is read for training; ε = 0"
    what = f"{plan.neighbours.verb} one of {plan.n_records:,} {plan.unit}s"
    if plan.non_private:
        return f"NOT PRIVATE, no noise ({what})"
    stages = {name: getattr(plan, name) for name in PRIVATE_STAGES}
    noises = [
        f"{name} {stage.noise_multiplier:.4g}"
        for name, stage in stages.items()
        if stage is not None
    ]
    return (
        f"ε = {plan.epsilon:g} at δ = {plan.delta:.3g} ({what}); noise multiplier "
        f"{', '.join(noises)}"
    )


def _work(config: RunConfig, plan: PrivacyPlan) -> str:
    made = f"{config.synthesis.n_images:,} synthetic images"
    if plan.finetune is not None:
        return f"{plan.steps:,} steps x {plan.batch_size:,} {plan.unit}s, then {made}"
    if plan.evolution is not None:
        return f"{plan.evolution.count:,} generations, then {made}"
    return made


def commented_yaml(sizing: Sizing, machine: Machine, *, command: str) -> str:
    """The text of ``run.yaml``: every chosen key with its reason, by section.

    Args:
        sizing: What was chosen.
        machine: For which machine.
        command: The next command.
    """
    lines = [
        *_comment(f"Written by `sapf init` for this machine: {machine.words()}."),
        *_comment(f"Next: {command}"),
        *_comment(f"Time: {sizing.forecast.words()}."),
        *_comment("Privacy: " + _budget(sizing.plan) + "."),
        *(line for note in sizing.notes for line in _comment(f"Note: {note}.")),
        *_comment("Every other key has its default; `sapf run --help` lists all of them."),
    ]
    titles = section_titles()
    by_section: dict[str, list[Choice]] = {}
    for choice in sizing.choices:
        by_section.setdefault(choice.key.rpartition(".")[0], []).append(choice)
    for section in titles:
        choices = by_section.get(section, [])
        if not choices:
            continue
        lines.append("")
        indent = ""
        if section:
            lines.append(f"{section}:  # {titles[section].rstrip('.')}")
            indent = "  "
        for choice in choices:
            name = choice.key.rpartition(".")[2]
            comment = f"  # {choice.why}" if choice.why else ""
            lines.append(f"{indent}{name}: {scalar(choice.value)}{comment}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="#   ")


def scalar(value: Any) -> str:
    """A value on one line of YAML.

    >>> scalar("a: b"), scalar(0.02), scalar(("a", "b")), scalar(None)
    ("'a: b'", '0.02', '[a, b]', 'null')
    """
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(
        plain, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def sizing_lines(sizing: Sizing, machine: Machine, *, images: str) -> Iterator[str]:
    """What ``sapf init`` prints.

    Args:
        sizing: What was chosen.
        machine: For which machine.
        images: What there is, in words.
    """
    config = sizing.config
    model = config.model.path
    yield f"images:    {images}"
    yield f"machine:   {machine.words()}"
    yield f"model:     {model}"
    yield f"work:      {_work(config, sizing.plan)}"
    yield f"privacy:   {_budget(sizing.plan)}"
    yield f"time:      {sizing.forecast.words()}"
    for note in sizing.notes:
        yield f"note:      {note}"
