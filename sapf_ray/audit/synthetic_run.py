"""A run's releases without its model: the plan's mechanism alone, through the run's own door.

Records contribute unit vectors in place of gradients. Sampler, clipping of canaries, exact sum,
payment, noise and observation are those of a run, so hundreds of runs take minutes and a fault of
any of these is seen as it would be there. What a model adds (per-record gradients, their norms) is
not audited here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from sapf_ray.audit.scores import Observed
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import LedgerEvent
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan
from sapf_ray.privacy.release import Releaser

BOUND = 1.0
COORDINATES = 64  # on which the records lie, beside the canaries' own


@dataclass(kw_only=True)
class MemoryLedger:
    """A ledger that keeps its lines in memory, for releases of made-up sums.

    Attributes:
        lines: What was paid.
    """

    lines: list[LedgerEvent] = field(default_factory=list)

    def noise_ids(self, release: str) -> set[str]:
        """None: no sum is released twice."""
        return set()

    def record(self, release: str, event: DpEvent, noise_id: str, stage: str) -> None:
        """Pays."""
        line = LedgerEvent(
            release=release, stage=stage, event=event, noise_id=noise_id, replay=False
        )
        self.lines.append(line)

    def events(self) -> list[LedgerEvent]:
        """All lines."""
        return self.lines


@dataclass(frozen=True, kw_only=True)
class MemoryCanaries(Canaries):
    """Canaries whose observations stay in memory.

    Attributes:
        shown: Name of the release to what was found of it.
    """

    shown: dict[str, np.ndarray] = field(default_factory=dict)

    def keep(self, name: str, shown: np.ndarray) -> None:
        """Keeps it."""
        self.shown[name] = shown


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """What :func:`release_all` leaves.

    Attributes:
        observed: What each release tells of the canaries.
        coins: (m,) bool.
        lines: The ledger's.
    """

    observed: list[Observed]
    coins: np.ndarray
    lines: list[LedgerEvent]


def release_all(
    plan: PrivacyPlan, canaries: int, *, key: NoiseKey, sizes: Mapping[str, int] | None = None
) -> SyntheticRun:
    """Makes every Gaussian release of a plan, with canaries.

    Args:
        plan: The plan.
        canaries: m.
        key: The bound key.
        sizes: Stage to the number of values in one of its releases, where that is less than all
            canaries need.
    """
    joined = MemoryCanaries(count=canaries, n_records=plan.n_records, key=key, folder="")
    ledger = MemoryLedger()
    releaser = Releaser(
        key=key,
        ledger=ledger,  # type: ignore[arg-type]
        plan=plan,
        canaries=joined,
    )
    observed = []
    for stage in PRIVATE_STAGES:
        planned = getattr(plan, stage)
        if planned is None or planned.mechanism != "gaussian":
            continue
        size = (sizes or {}).get(stage, canaries + COORDINATES)
        for number in range(planned.count):
            name = f"{stage}/{number}"
            total = _sum_of(releaser.sample(name, stage=stage), size)
            releaser.gaussian(name, total, stage=stage)
            shown = joined.shown[name]
            observed.append(
                Observed(name=name, stage=planned, seen=shown["seen"], drawn=shown["drawn"])
            )
    return SyntheticRun(observed=observed, coins=joined.coins(), lines=ledger.lines)


def _sum_of(records: np.ndarray, size: int) -> ExactSum:
    """Record i contributes C along coordinate i modulo ``COORDINATES``."""
    counts = np.bincount(records % min(COORDINATES, size), minlength=size).astype(np.int64)
    return ExactSum.of([torch.from_numpy(counts) * round(BOUND / grid_step(BOUND))], BOUND)
