"""What an estimate says: each stage, their sum, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sapf_ray.estimate.costs import DeviceCosts


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
