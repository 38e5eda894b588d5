"""What an estimate says: each stage, and their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        """Cost of all devices for so many hours, in the price's unit."""
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
        memory_gb: Peak of a device as measured; None where unknown.
    """

    unit: str
    units: float
    devices: int
    seconds_per_unit: float | None = None
    hours: float | None = None
    memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """All stages, and the sum of those whose cost is known."""

    cluster: Cluster
    stages: dict[str, StageEstimate]
    hours: float
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
            "device_hours": self.hours * cluster.count,
            "price_per_device_hour": cluster.price,
            **self._money(self),
            "notes": self.notes,
        }

    def _money(self, part: StageEstimate | RunEstimate) -> dict[str, float | None]:
        return {"cost": self.cluster.cost(part.hours)}


def _stage_dict(stage: StageEstimate) -> dict[str, Any]:
    """The fields of a stage, in the order in which they are published."""
    return {
        "unit": stage.unit,
        "units": stage.units,
        "seconds_per_unit": stage.seconds_per_unit,
        "devices": stage.devices,
        "hours": stage.hours,
        "memory_gb": stage.memory_gb,
    }
