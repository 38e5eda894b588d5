"""The one door from an exact sum to anything that may be seen.

:class:`Releaser` pays a release in the ledger, then draws its noise, in this order and in one
place. No other module imports the noise functions (a contract in ``pyproject.toml`` says so).

What is drawn is bound to what was summed. The noise stream is keyed by the run's bound key (its
secret and its fingerprint, :meth:`NoiseKey.bind`), the release's name and the digest of the exact
sum, and the ledger's ``noise_id`` is a fingerprint of the same. So equal noise never meets unequal
sums: the same release of the same sum is an exact replay, free; with another sum (weights changed
in place, another library, another micro-batch) it is other noise and a charge, or refused by the
budget.

Example::

    releaser = Releaser(key=key.bind(*fingerprint), ledger=ledger, plan=plan)
    records = releaser.sample("finetune/step/17", stage="finetune")
    (noisy,) = releaser.gaussian("finetune/step/17", total, stage="finetune")

References:
    1. Casacuberta, Shoemate, Vadhan, Wagaman. Widespread underestimation of sensitivity in
       differentially private libraries and how to fix it. CCS 2022.
    2. McSherry, Talwar. Mechanism design via differential privacy. FOCS 2007.
    3. Dwork, Lei. Differential privacy and robust statistics. STOC 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from torch import Tensor

from sapf_ray.privacy import noise
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey, NoiseStream
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan
from sapf_ray.privacy.rounded_gaussian import sampler_delta
from sapf_ray.privacy.sampling import poisson_sample

__all__ = ["Releaser", "draw_epsilon", "sampler_delta"]


@dataclass(frozen=True, kw_only=True)
class Releaser:
    """Pays a release, then draws its noise.

    Args:
        key: The run's bound key (:meth:`NoiseKey.bind`).
        ledger: Where releases are paid.
        plan: What may be released; it fixes noise, sample rates and events of each stage.
        on_change: Called with the name of a release that was paid before with another sum.
        canaries: Join every sum, in a run that is audited.
        n_units: Number of records that there are, where the plan's N may be a nominal one; as
            secret as they. By default the plan's N.
    """

    key: NoiseKey
    ledger: Ledger
    plan: PrivacyPlan
    on_change: Callable[[str], None] = lambda name: None
    canaries: Canaries | None = None
    n_units: int | None = None

    @property
    def run_id(self) -> str:
        """Public fingerprint of the bound key; every ``noise_id`` of this run begins with it."""
        return self.key.stream_id("run")[:16]

    def noise_id(self, name: str, total: ExactSum) -> str:
        """What the ledger calls the release ``name`` of exactly this sum."""
        return f"{self.run_id}-{self.key.stream_id('noise', name, total.digest())}"

    def joined(self, name: str, total: ExactSum, *, stage: str) -> ExactSum:
        """The sum that is released: with an audit's canaries, in any other run as it is."""
        if self.canaries is None:
            return total
        rate = self._stage(stage).sample_rate
        return self.canaries.join(name, total, stage=stage, rate=rate)

    def has_paid(self, stage: str) -> bool:
        """Whether this very run, and not another whose release it uses, has paid in ``stage``."""
        return any(
            event.stage == stage and event.drawn_by == self.run_id for event in self.ledger.events()
        )

    def gaussian(self, name: str, total: ExactSum, *, stage: str) -> list[Tensor]:
        """The sum with Gaussian noise of std ``noise_multiplier * sensitivity * (1 + slack)``.

        Args:
            name: Name of the release in the ledger, e.g. ``finetune/step/17``.
            total: The exact sum over all shards and ranks.
            stage: The plan's stage.

        Returns:
            float64 tensors, on the sum's grid.

        Raises:
            BudgetError: The release would pass the planned epsilon; nothing has been drawn.
        """
        planned = self._planned(stage, "gaussian")
        joined, stream = self._pay(name, total, stage=stage)
        noisy = joined.values()
        if planned.noise_multiplier > 0:
            noisy = noise.noisy_sum(joined, planned.noise_multiplier * (1 + planned.slack), stream)
        if self.canaries is not None:
            rate = planned.sample_rate
            self.canaries.note(name, noisy, total=total, stage=stage, rate=rate)
        return noisy

    def exponential(self, name: str, total: ExactSum, *, stage: str, n: int) -> list[int]:
        """The ``n`` positions drawn one by one with probability proportional to exp(e u / C).

        Args:
            name: Name of the release in the ledger.
            total: One tensor (K,) of utilities u, to which a record adds numbers in [0, C].
            stage: The plan's stage; its noise multiplier prices all n draws together.
            n: Number of positions, in [1, K].

        Returns:
            Positions in the order drawn; the noisy utilities are not released.

        Raises:
            BudgetError: The release would pass the planned epsilon; nothing has been drawn.
        """
        planned = self._planned(stage, "exponential")
        total, stream = self._pay(name, total, stage=stage)
        (utility,) = total.values()
        if planned.noise_multiplier > 0:
            scale = total.sensitivity / draw_epsilon(planned.noise_multiplier, n)
            utility = noise.add_gumbel(utility, scale, stream)
        return _largest(utility, n)

    def propose_test(
        self, name: str, total: ExactSum, *, stage: str, n: int
    ) -> tuple[list[int] | None, bool]:
        """The ``n`` largest positions as they are, if the gap below them passes a noisy test.

        Args:
            name: Name of the release in the ledger.
            total: One tensor (K,) of utilities, to which a record adds numbers in [0, C].
            stage: The plan's stage; 1 / noise multiplier is the test's epsilon.
            n: Number of positions, in [1, K].

        Returns:
            The positions, largest first, and True; or None and False where the test failed.

        Raises:
            BudgetError: The release would pass the planned epsilon; nothing has been drawn.
        """
        planned = self._planned(stage, "propose_test_release")
        total, stream = self._pay(name, total, stage=stage)
        (utility,) = total.values()
        if planned.noise_multiplier > 0 and n < len(utility):
            ordered = utility.sort(descending=True).values
            gap = ordered[n - 1] - ordered[n]
            scale = total.sensitivity * planned.noise_multiplier
            threshold = total.sensitivity + scale * math.log(1 / (2 * planned.delta))
            if not bool(noise.add_laplace(gap, scale, stream) > threshold):
                return None, False
        return _largest(utility, n), True

    def sample(self, name: str, *, stage: str) -> np.ndarray:
        """Indices of the records of one release: each is in with the stage's rate, independently.

        Args:
            name: Name of the release in the ledger.
            stage: The plan's stage.

        Returns:
            Sorted int64 indices of records that there are; their number is secret.
        """
        rate = self._stage(stage).sample_rate
        there = self.plan.n_records if self.n_units is None else self.n_units
        return poisson_sample(there, rate, stream=self.key.stream("sample", name))

    def pay_shared(self, name: str, *, stage: str, noise_id: str) -> None:
        """Pays for a release that another run drew; call it before looking at it.

        Args:
            name: Name of the release in the ledger.
            stage: The plan's stage.
            noise_id: Under which the run that drew it has paid it.

        Raises:
            BudgetError: The release would pass the planned epsilon.
        """
        if noise_id not in self.ledger.noise_ids(name):
            self.ledger.record(name, self._stage(stage).event(), noise_id, stage)

    def _pay(self, name: str, total: ExactSum, *, stage: str) -> tuple[ExactSum, NoiseStream]:
        """Records the release; only then is there a stream for its noise.

        Returns:
            The sum to release, which an audit's canaries have joined, and the stream.
        """
        total = self.joined(name, total, stage=stage)
        total.check_range()
        digest = total.digest()
        noise_id = f"{self.run_id}-{self.key.stream_id('noise', name, digest)}"
        if self.ledger.noise_ids(name) - {noise_id}:
            self.on_change(name)
        self.ledger.record(name, self._stage(stage).event(), noise_id, stage)
        return total, self.key.stream("noise", name, digest)

    def _stage(self, stage: str) -> StagePlan:
        planned: StagePlan | None = getattr(self.plan, stage)
        if planned is None:
            raise ValueError(f"the plan has no releases of stage {stage!r}")
        return planned

    def _planned(self, stage: str, mechanism: str) -> StagePlan:
        planned = self._stage(stage)
        if planned.mechanism != mechanism:
            raise ValueError(f"the plan has {planned.mechanism} in {stage}, not {mechanism}")
        multiplier = planned.noise_multiplier
        if not (multiplier > 0 or (self.plan.non_private and multiplier == 0)):
            raise ValueError(f"noise_multiplier = {multiplier!r}: must be above 0")
        return planned


def draw_epsilon(noise_multiplier: float, n: int) -> float:
    """Epsilon of each of n exponential draws that together are 1 / noise_multiplier-GDP.

    Example:
        >>> round(draw_epsilon(25.0, 29), 5)
        0.00593
    """
    half = 1 / (2 * noise_multiplier * math.sqrt(n))
    return float(norm.logcdf(half) - norm.logsf(half))


def _largest(values: Tensor, n: int) -> list[int]:
    """Positions of the n largest values; ties go to the earlier one."""
    return values.sort(descending=True, stable=True).indices[:n].tolist()
