"""How long a planned run takes on some devices, what memory it needs there and what it costs.

This is ``sapf plan --cluster``. Time of a stage = its work x measured seconds of a unit / devices
that can share it. Nothing is read but the config.

Example::

    cluster = open_cluster("4xa6000", config)  # the paper's setting on the paper's machine
    plan = make_plan(config, n_records=45_000)
    estimate_run(config, plan, cluster=cluster).stages["finetune"].hours  # 3.5
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from sapf_ray.config import RunConfig
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.costs import (
    UNITS,
    Measured,
    check_measured_model,
    model_notes,
    parallel_parts,
    resolution_factor,
    resolution_of,
    shipped_costs,
    work,
)
from sapf_ray.estimate.measurements import read_costs
from sapf_ray.estimate.result import Cluster, RunEstimate, StageEstimate
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.stages import Stage


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
    *,
    cluster: Cluster,
) -> RunEstimate:
    """The run's stages on the cluster, which it has to itself."""
    costs = cluster.costs
    efficiency = 1.0
    if costs.efficiency is not None and cluster.count > costs.devices:
        efficiency = costs.efficiency
    stages = {}
    for name, units in work(config, plan).items():
        parts = parallel_parts(name, config, plan=plan)
        stages[name] = _stage(
            name,
            units,
            row=costs.of(name, config),
            cluster=cluster,
            devices=min(cluster.count, parts),
            efficiency=efficiency if name == Stage.FINETUNE else 1.0,
            factor=resolution_factor(costs, name, config),
        )
    start = costs.start_seconds / 3600
    return RunEstimate(
        cluster=cluster,
        stages=stages,
        hours=start + sum(stage.hours or 0.0 for stage in stages.values()),
        notes=_notes(
            config,
            cluster,
            stages=stages,
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
    each = factor * row.seconds * cluster.costs.devices / row.units
    start = row.start_seconds / 3600
    hours = units * each / devices / efficiency / 3600
    return StageEstimate(
        unit=UNITS[name],
        units=units,
        devices=devices,
        seconds_per_unit=each,
        hours=start + hours,
        memory_gb=row.memory_gb,
    )


def _notes(
    config: RunConfig,
    cluster: Cluster,
    *,
    stages: dict[str, StageEstimate],
    efficiency: float,
) -> list[str]:
    costs = cluster.costs
    devices = f"{costs.devices} devices" if costs.devices > 1 else "one device"
    notes = [
        f"measured on {devices} with {costs.model}: {costs.source}",
        *model_notes(costs, config),
        *costs.notes,
    ]
    notes += _resolution_notes(config, cluster, stages)
    if Stage.EVOLUTION in stages and Stage.EVOLUTION not in costs.stages:
        notes.append(
            "a pass of the evolution is taken to cost one of synthesis; embedding and votes come "
            "on top (the paper's PE, of a population whose size it does not report, took 43.5 h "
            "on four A6000s)"
        )
    if Stage.FINETUNE in stages:
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


def _resolution_notes(config: RunConfig, cluster: Cluster, stages: Iterable[str]) -> list[str]:
    costs = cluster.costs
    if not costs.resolution:
        return []
    notes = []
    factors = {name: resolution_factor(costs, name, config) for name in stages}
    for factor in sorted({value for value in factors.values() if value != 1}):
        names = [name for name, value in factors.items() if value == factor]
        side = resolution_of(names[0], config)
        notes.append(
            f"measured at {costs.resolution} px, requested are {side} px, {factor:.2g} times the "
            f"arithmetic of a pass: {', '.join(names)} scaled by that"
        )
    if any(resolution_of(name, config) is None for name in stages):
        notes.append(
            f"measured at {costs.resolution} px, and taken to run at that: the side of "
            f"{config.model.path}'s images is read by the run (model.resolution sets it)"
        )
    return notes


def _finetune_notes(
    config: RunConfig,
    cluster: Cluster,
    *,
    efficiency: float,
) -> list[str]:
    costs = cluster.costs
    notes = []
    row = costs.of(Stage.FINETUNE, config)
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
            f"the run takes all {cluster.count} where finetune.num_workers and gpus_per_… are "
            "auto, as by default"
        )
    return notes
