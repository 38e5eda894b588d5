"""How long a planned run takes on some devices, what memory it needs there and what it costs.

This is ``sapf plan --cluster``. Time of a stage = its work x measured seconds of a unit / devices
that can share it. Nothing is read but the config.

Example::

    cluster = open_cluster("4xa6000", config)  # the paper's setting on the paper's machine
    plan = make_plan(config, n_records=45_000)
    estimate_run(config, plan, cluster).stages["finetune"].hours  # 3.5
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sapf_ray.config import RunConfig
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.costs import (
    UNITS,
    DeviceCosts,
    Measured,
    check_measured_model,
    model_notes,
    parallel_parts,
    read_costs,
    resolution_factor,
    shipped_costs,
    work,
)
from sapf_ray.privacy.planner import PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices.

    Attributes:
        name: Name of the device.
        count: Number of devices.
        costs: What is known of the device.
        price: Price of one device for an hour, None where unknown.
    """

    name: str
    count: int
    costs: DeviceCosts
    price: float | None = None

    def cost(self, hours: float | None) -> float | None:
        """Of all devices for so many hours, in the price's unit."""
        if hours is None or self.price is None:
            return None
        return hours * self.count * self.price


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage.

    Attributes:
        unit: Unit of its work.
        units: Work, in ``unit``.
        devices: Number of devices that find work at the same time.
        seconds_per_unit: Seconds of one device; None where it was not measured, and then ``hours``
            too.
        hours: Wall time.
        hours_at_most: The same if time grows with arithmetic from the measured resolution to the
            model's own.
        memory_gb: Peak of a device as measured; None where unknown.
    """

    unit: str
    units: float
    devices: int
    seconds_per_unit: float | None = None
    hours: float | None = None
    hours_at_most: float | None = None
    memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """All stages, and the sum of those whose cost is known."""

    cluster: Cluster
    stages: dict[str, StageEstimate]
    hours: float
    hours_at_most: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The object ``cluster`` of ``sapf plan --cluster … --json``."""
        cluster = self.cluster
        costs = cluster.costs
        stages = {}
        for name, stage in self.stages.items():
            stages[name] = _stage_dict(stage) | self._money(stage)
        return {
            "devices": cluster.count,
            "device": cluster.name,
            "title": costs.title,
            "source": costs.source,
            "measured_model": costs.model,
            "measured_devices": costs.devices,
            "stages": stages,
            "start_hours": costs.start_seconds / 3600,
            "hours": self.hours,
            "hours_at_most": self.hours_at_most,
            "device_hours": self.hours * cluster.count,
            "price_per_device_hour": cluster.price,
            **self._money(self),
            "notes": self.notes,
        }

    def table(self) -> Table:
        """For the terminal."""
        cluster = self.cluster
        time = _span(_time, self.hours, high=self.hours_at_most)
        table = Table(
            title=f"{cluster.count} x {cluster.costs.title}: about {time}",
            caption="\n".join(f"- {note}" for note in self.notes),
            caption_justify="left",
        )
        table.add_column("stage")
        for name in ("work", "a unit", "time", "GB a device"):
            table.add_column(name, justify="right")
        if cluster.price is not None:
            table.add_column("cost", justify="right")
        for name, stage in self.stages.items():
            table.add_row(*self._stage_cells(name, stage))
        start = cluster.costs.start_seconds / 3600
        if start:
            table.add_row("start and end", "", "", *self._time_cells(start, start))
        table.add_row("in all", "", "", *self._time_cells(self.hours, self.hours_at_most))
        return table

    def _money(self, part: StageEstimate | RunEstimate) -> dict[str, float | None]:
        return {
            "cost": self.cluster.cost(part.hours),
            "cost_at_most": self.cluster.cost(part.hours_at_most),
        }

    def _stage_cells(self, name: str, stage: StageEstimate) -> list[str]:
        work_cell = f"{stage.units:,.0f} {stage.unit}"
        each = "-"
        if stage.seconds_per_unit is not None:
            each = f"{1000 * stage.seconds_per_unit:.3g} ms"
        memory = "-"
        if stage.memory_gb is not None:
            memory = f"{stage.memory_gb:.1f}"
        times = self._time_cells(stage.hours, stage.hours_at_most, memory=memory)
        return [name, work_cell, each, *times]

    def _time_cells(
        self,
        hours: float | None,
        at_most: float | None,
        *,
        memory: str = "",
    ) -> list[str]:
        """Time, memory, and the cost where there is a price."""
        time = "not measured"
        if hours is not None and at_most is not None:
            time = _span(_time, hours, high=at_most)
        if self.cluster.price is None:
            return [time, memory]
        low = self.cluster.cost(hours)
        high = self.cluster.cost(at_most)
        money = "-"
        if low is not None and high is not None:
            money = _span("{:,.2f}".format, low, high=high)
        return [time, memory, money]


def _stage_dict(stage: StageEstimate) -> dict[str, Any]:
    """The fields of a stage, in the order in which they are published."""
    return {
        "unit": stage.unit,
        "units": stage.units,
        "seconds_per_unit": stage.seconds_per_unit,
        "devices": stage.devices,
        "hours": stage.hours,
        "hours_at_most": stage.hours_at_most,
        "memory_gb": stage.memory_gb,
    }


def open_cluster(
    spec: str | None,
    config: RunConfig,
    *,
    costs_file: str | None = None,
    price: float | None = None,
) -> Cluster | None:
    """The cluster of ``--cluster``, ``--cluster_costs`` and ``--cluster_price``.

    Args:
        spec: COUNTxDEVICE, such as 4xa6000; None where no cluster is requested.
        config: The planned run.
        costs_file: A measurement of the user's own.
        price: Price of one device for an hour.

    Returns:
        None where no cluster is requested.

    Raises:
        ConfigError: Not COUNTxDEVICE, an unknown device, a file without a measurement, or one of
            another model.
    """
    if spec is None:
        for option, value in (("--cluster_costs", costs_file), ("--cluster_price", price)):
            if value is not None:
                raise ConfigError(option, value, "needs --cluster COUNTxDEVICE beside it")
        return None
    known = shipped_costs()
    count, name = _parsed(spec, known)
    if costs_file is None and name not in known:
        allowed = (
            f"device must be one of {', '.join(known)}, or any name with a measurement in "
            "--cluster_costs"
        )
        raise ConfigError("--cluster", spec, allowed)
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError("--cluster_price", price, "must be a finite number of at least 0")
    costs = known[name] if costs_file is None else read_costs(costs_file, config)
    check_measured_model(costs, config)
    return Cluster(
        name=name,
        count=count,
        costs=costs,
        price=price,
    )


def _parsed(spec: str, known: Iterable[str]) -> tuple[int, str]:
    """Number of devices and name of the device."""
    found = re.fullmatch(r"(\d+)x([A-Za-z][\w.-]*)", spec)
    if found is None:
        allowed = f"must be COUNTxDEVICE, such as 4xa6000; devices: {', '.join(known)}"
        raise ConfigError("--cluster", spec, allowed)
    count = int(found[1])
    if count < 1:
        raise ConfigError("--cluster", spec, "must have at least 1 device")
    return count, found[2]


def estimate_run(
    config: RunConfig,
    plan: PrivacyPlan,
    cluster: Cluster,
) -> RunEstimate:
    """The run's stages on the cluster, which it has to itself."""
    costs = cluster.costs
    factor = resolution_factor(costs, config)
    efficiency = 1.0
    if costs.efficiency is not None and cluster.count > costs.devices:
        efficiency = costs.efficiency
    stages = {}
    for name, units in work(config, plan).items():
        parts = parallel_parts(name, config, plan)
        stages[name] = _stage(
            name,
            units,
            row=costs.of(name, config),
            cluster=cluster,
            devices=min(cluster.count, parts),
            efficiency=efficiency if name == "finetune" else 1.0,
            factor=1.0 if name == "evaluation" else factor,
        )
    start = costs.start_seconds / 3600
    return RunEstimate(
        cluster=cluster,
        stages=stages,
        hours=start + sum(stage.hours or 0.0 for stage in stages.values()),
        hours_at_most=start + sum(stage.hours_at_most or 0.0 for stage in stages.values()),
        notes=_notes(
            config,
            cluster,
            stages=stages,
            factor=factor,
            efficiency=efficiency,
        ),
    )


def _stage(
    name: str,
    units: float,
    *,
    row: Measured | None,
    cluster: Cluster,
    devices: int,
    efficiency: float,
    factor: float,
) -> StageEstimate:
    """One stage.

    Args:
        name: Name of the stage.
        units: Its work.
        row: Its measurement, None where there is none.
        cluster: The devices.
        devices: Number of devices that find work at the same time.
        efficiency: Speed of each device, as a part of a lone one's.
        factor: How much more arithmetic a unit has than as measured.
    """
    if row is None:
        return StageEstimate(
            unit=UNITS[name],
            units=units,
            devices=devices,
        )
    each = row.seconds * cluster.costs.devices / row.units
    start = row.start_seconds / 3600
    hours = units * each / devices / efficiency / 3600
    return StageEstimate(
        unit=UNITS[name],
        units=units,
        devices=devices,
        seconds_per_unit=each,
        hours=start + hours,
        hours_at_most=start + factor * hours,
        memory_gb=row.memory_gb,
    )


def _notes(
    config: RunConfig,
    cluster: Cluster,
    *,
    stages: dict[str, StageEstimate],
    factor: float,
    efficiency: float,
) -> list[str]:
    costs = cluster.costs
    devices = f"{costs.devices} devices" if costs.devices > 1 else "one device"
    notes = [
        f"measured on {devices} with {costs.model}: {costs.source}",
        *model_notes(costs, config),
        *costs.notes,
    ]
    if factor != 1:
        notes.append(
            f"measured at {costs.resolution} px; a pass at the native resolution of "
            f"{config.model.path} has {factor:.2g} times the arithmetic: hence the second time"
        )
    if "evolution" in stages and "evolution" not in costs.stages:
        notes.append(
            "a pass of the evolution is taken to cost one of synthesis; embedding and votes come "
            "on top (the paper's PE, of a population whose size it does not report, took 43.5 h "
            "on four A6000s)"
        )
    if "finetune" in stages:
        notes += _finetune_notes(config, cluster, efficiency=efficiency)
    idle = [
        f"{name} {stage.devices}" for name, stage in stages.items() if stage.devices < cluster.count
    ]
    if idle:
        notes.append(f"no more devices find work in: {', '.join(idle)} (shard sizes, classifiers)")
    unknown = [name for name, stage in stages.items() if stage.hours is None]
    if unknown:
        notes.append(f"not in the sum, for not measured on its own: {', '.join(unknown)}")
    return notes


def _finetune_notes(
    config: RunConfig,
    cluster: Cluster,
    *,
    efficiency: float,
) -> list[str]:
    costs = cluster.costs
    notes = []
    row = costs.of("finetune", config)
    if row is not None and row.adapter != config.finetune.adapter:
        notes.append(
            f"fine-tuning was measured with finetune.adapter {row.adapter}; "
            f"{config.finetune.adapter} is taken to cost as many times that as in the paper's "
            "Table 12"
        )
    if cluster.count != costs.devices:
        why = f"each device at {efficiency:.2g} of a lone one, as measured with two workers"
        if costs.efficiency is None:
            why = (
                "linear, an upper bound of the speed: what exchanging gradients costs was not "
                "measured"
            )
        notes.append(f"fine-tuning on {cluster.count}: {why}")
    if cluster.count > 1:
        notes.append(
            f"the run must request them: --finetune.num_workers {cluster.count}, and each stage's "
            "gpus_per_… for GPUs"
        )
    return notes


def _span(
    form: Callable[[float], str],
    low: float,
    *,
    high: float,
) -> str:
    if form(low) == form(high):
        return form(low)
    return f"{form(low)} to {form(high)}"


def _time(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:,.1f} h"
    if hours >= 1 / 60:
        return f"{60 * hours:.1f} min"
    return f"{3600 * hours:.0f} s"
