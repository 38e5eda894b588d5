"""How long a planned run takes on some devices, what memory it wants there and what it costs:
``sapf plan --cluster``.

Time of a stage = its work x measured seconds of a unit / devices that can share it. Nothing is read
but the config.

Example::

    cluster = open_cluster("4xa6000", config)  # the paper's setting on the paper's machine
    estimate(config, make_plan(config, n_records=45_000), cluster).stages["finetune"].hours  # 3.5
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sapf_ray.config import RunConfig
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.costs import (
    UNITS,
    DeviceCosts,
    check_model,
    model_notes,
    pieces,
    read_costs,
    resolution_factor,
    shipped_costs,
    work,
)
from sapf_ray.privacy.planner import PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``count`` equal devices; ``price`` is of one for an hour, None where unknown."""

    name: str
    count: int
    costs: DeviceCosts
    price: float | None = None

    def cost(self, hours: float | None) -> float | None:
        """Of all devices for so many hours, in the price's unit."""
        return None if hours is None or self.price is None else hours * self.count * self.price


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage.

    Args:
        units: Work, in ``unit``.
        seconds_per_unit: Of one device; None where it was not measured, and then ``hours`` too.
        devices: How many find work at the same time.
        hours: Wall time.
        hours_at_most: The same if time grows with arithmetic from the measured resolution to the
            model's own.
        memory_gb: Peak of a device as measured; None where unknown.
    """

    unit: str
    units: float
    seconds_per_unit: float | None
    devices: int
    hours: float | None
    hours_at_most: float | None
    memory_gb: float | None


@dataclass(frozen=True)
class Estimate:
    """All stages, and the sum of those whose cost is known."""

    cluster: Cluster
    stages: dict[str, StageEstimate]
    hours: float
    hours_at_most: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The object ``cluster`` of ``sapf plan --cluster … --json``."""
        cluster, costs = self.cluster, self.cluster.costs

        def money(part: StageEstimate | Estimate) -> dict[str, float | None]:
            return {
                "cost": cluster.cost(part.hours),
                "cost_at_most": cluster.cost(part.hours_at_most),
            }

        return {
            "devices": cluster.count,
            "device": cluster.name,
            "title": costs.title,
            "source": costs.source,
            "measured_model": costs.model,
            "measured_devices": costs.devices,
            "stages": {
                name: dataclasses.asdict(stage) | money(stage)
                for name, stage in self.stages.items()
            },
            "start_hours": costs.start_seconds / 3600,
            "hours": self.hours,
            "hours_at_most": self.hours_at_most,
            "device_hours": self.hours * cluster.count,
            "price_per_device_hour": cluster.price,
            **money(self),
            "notes": self.notes,
        }

    def table(self) -> Table:
        """For the terminal."""
        cluster, priced = self.cluster, self.cluster.price is not None
        table = Table(
            title=f"{cluster.count} x {cluster.costs.title}: about {_span(_time, self.hours, high=self.hours_at_most)}",
            caption="\n".join(f"- {note}" for note in self.notes),
            caption_justify="left",
        )
        table.add_column("stage")
        for name in ("work", "a unit", "time", "GB a device", *(["cost"] if priced else [])):
            table.add_column(name, justify="right")

        def add(
            name: str, done: str, each: str, memory: str, hours: float | None, at_most: float | None
        ) -> None:
            time = (
                "not measured"
                if hours is None or at_most is None
                else _span(_time, hours, high=at_most)
            )
            low, high = cluster.cost(hours), cluster.cost(at_most)
            money = "-" if low is None or high is None else _span("{:,.2f}".format, low, high=high)
            table.add_row(name, done, each, time, memory, *([money] if priced else []))

        for name, stage in self.stages.items():
            each = (
                "-" if stage.seconds_per_unit is None else f"{1000 * stage.seconds_per_unit:.3g} ms"
            )
            memory = "-" if stage.memory_gb is None else f"{stage.memory_gb:.1f}"
            add(
                name,
                f"{stage.units:,.0f} {stage.unit}",
                each,
                memory,
                stage.hours,
                stage.hours_at_most,
            )
        if cluster.costs.start_seconds:
            start = cluster.costs.start_seconds / 3600
            add("start and end", "", "", "", start, start)
        add("in all", "", "", "", self.hours, self.hours_at_most)
        return table


def open_cluster(
    spec: str | None,
    config: RunConfig,
    *,
    costs_file: str | None = None,
    price: float | None = None,
) -> Cluster | None:
    """What ``--cluster``, ``--cluster_costs`` and ``--cluster_price`` ask for; None where no
    cluster is asked for.

    Raises:
        ConfigError: Not COUNTxDEVICE, an unknown device, a file without a measurement, or one of
            another model.
    """
    if spec is None:
        for option, value in (("--cluster_costs", costs_file), ("--cluster_price", price)):
            if value is not None:
                raise ConfigError(option, value, "needs --cluster COUNTxDEVICE beside it")
        return None
    found = re.fullmatch(r"(\d+)x([A-Za-z][\w.-]*)", spec)
    known = shipped_costs()
    if found is None:
        raise ConfigError(
            "--cluster", spec, f"must be COUNTxDEVICE, such as 4xa6000; devices: {', '.join(known)}"
        )
    count, name = int(found[1]), found[2]
    if count < 1:
        raise ConfigError("--cluster", spec, "must have at least 1 device")
    if costs_file is None and name not in known:
        raise ConfigError(
            "--cluster",
            spec,
            f"device must be one of {', '.join(known)}, or any name with a measurement in --cluster_costs",
        )
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError("--cluster_price", price, "must be a finite number of at least 0")
    costs = known[name] if costs_file is None else read_costs(costs_file, config)
    check_model(costs, config)
    return Cluster(name=name, count=count, costs=costs, price=price)


def estimate(config: RunConfig, plan: PrivacyPlan, cluster: Cluster) -> Estimate:
    """The run's stages on the cluster, which it has to itself."""
    costs, factor = cluster.costs, resolution_factor(cluster.costs, config)
    efficiency = (
        1.0 if costs.efficiency is None or cluster.count <= costs.devices else costs.efficiency
    )
    stages: dict[str, StageEstimate] = {}
    for name, units in work(config, plan).items():
        row, busy = costs.of(name, config), min(cluster.count, pieces(name, config, plan))
        if row is None:
            stages[name] = StageEstimate(
                unit=UNITS[name],
                units=units,
                seconds_per_unit=None,
                devices=busy,
                hours=None,
                hours_at_most=None,
                memory_gb=None,
            )
            continue
        each = row.seconds * costs.devices / row.units
        start = row.start_seconds / 3600
        hours = units * each / busy / (efficiency if name == "finetune" else 1.0) / 3600
        more = 1.0 if name == "evaluation" else factor
        stages[name] = StageEstimate(
            unit=UNITS[name],
            units=units,
            seconds_per_unit=each,
            devices=busy,
            hours=start + hours,
            hours_at_most=start + more * hours,
            memory_gb=row.memory_gb,
        )
    start = costs.start_seconds / 3600
    hours = start + sum(stage.hours or 0.0 for stage in stages.values())
    return Estimate(
        cluster,
        stages,
        hours,
        start + sum(stage.hours_at_most or 0.0 for stage in stages.values()),
        _notes(config, cluster, stages=stages, factor=factor, efficiency=efficiency),
    )


def _notes(
    config: RunConfig,
    cluster: Cluster,
    *,
    stages: dict[str, StageEstimate],
    factor: float,
    efficiency: float,
) -> list[str]:
    costs, count = cluster.costs, cluster.count
    of = f"{costs.devices} devices" if costs.devices > 1 else "one device"
    notes = [
        f"measured on {of} with {costs.model}: {costs.source}",
        *model_notes(costs, config),
        *costs.notes,
    ]
    if factor != 1:
        notes.append(
            f"measured at {costs.resolution} px; a pass at the own resolution of {config.model.path} has {factor:.2g} times the "
            "arithmetic: hence the second time"
        )
    if "evolution" in stages and "evolution" not in costs.stages:
        notes.append(
            "a pass of the evolution is taken to cost one of synthesis; embedding and votes come on top (the paper's PE, of a "
            "population that it does not tell, took 43.5 h on four A6000s)"
        )
    if "finetune" in stages:
        row = costs.of("finetune", config)
        if row is not None and row.adapter != config.finetune.adapter:
            notes.append(
                f"fine-tuning was measured with finetune.adapter {row.adapter}; {config.finetune.adapter} is taken to cost "
                "as many times that as in the paper's Table 12"
            )
        if count != costs.devices:
            why = f"each device at {efficiency:.2g} of a lone one, as measured with two workers"
            if costs.efficiency is None:
                why = "linear, an upper bound of the speed: what exchanging gradients costs was not measured"
            notes.append(f"fine-tuning on {count}: {why}")
        if count > 1:
            notes.append(
                f"the run must ask for them: --finetune.num_workers {count}, and each stage's gpus_per_… for GPUs"
            )
    idle = [f"{name} {stage.devices}" for name, stage in stages.items() if stage.devices < count]
    if idle:
        notes.append(f"no more devices find work in: {', '.join(idle)} (shard sizes, classifiers)")
    unknown = [name for name, stage in stages.items() if stage.hours is None]
    if unknown:
        notes.append(f"not in the sum, for not measured on its own: {', '.join(unknown)}")
    return notes


def _span(form: Callable[[float], str], low: float, *, high: float) -> str:
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def _time(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
