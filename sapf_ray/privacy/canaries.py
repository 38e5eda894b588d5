"""Virtual records that join a run's releases, so that its own claim can be attacked.

Each of m canaries is a record that does not exist, with a gradient along one coordinate that no
clipping would let pass whole. A secret fair coin decides whether it is in the data set; if so it is
Poisson-sampled by the run's own sampler and stream, clipped by the run's own clipping, and enters
the exact sum before the releaser pays and draws. What a release tells of the canaries, its noisy
value less the sum of all other records, is kept for :mod:`sapf_ray.audit`: everything but the coins
is what differential privacy lets an attacker know.

A run with canaries is a measurement: its plan says so, and it is never released.

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Nasr et al. Tight auditing of differentially private machine learning. USENIX Security 2023.
       (canaries in gradient space)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sapf_ray.files import write_array
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.sampling import poisson_sample

RAW_NORM = 1000.0
"""Norm of a canary before clipping, in units of the bound."""

COINS = "coins.npy"
OBSERVATION = np.dtype([("seen", np.float32), ("drawn", np.bool_)])
"""Of one canary in one release: noise and contribution in units of the sensitivity; whether the
sample holds it, be it in or not."""


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The canaries of one run.

    Attributes:
        count: m.
        n_records: N of the real records, which the sampler numbers first.
        key: The run's bound key.
        folder: Where observations are kept: secret, mode 0700.
    """

    count: int
    n_records: int
    key: NoiseKey
    folder: str

    def coins(self) -> np.ndarray:
        """Whether each canary is in the data set, bool (m,): secret until the run is over."""
        return (self.key.stream("canaries/coins").words(self.count) >> np.uint64(63)).astype(bool)

    def coordinates(self, stage: str, size: int) -> np.ndarray:
        """A coordinate of its own for each of the first min(m, size) canaries.

        Args:
            stage: The plan's stage.
            size: Number of values of one of its releases.

        Returns:
            int64 positions in the release, laid out flat.
        """
        order = np.argsort(self.key.stream("canaries/coordinates", stage).words(size))
        return order[: self.count]

    def sampled(self, name: str, rate: float) -> np.ndarray:
        """Whether each canary would be in the sample of one release, bool (m,)."""
        everyone = self.n_records + self.count
        indices = poisson_sample(everyone, rate, stream=self.key.stream("sample", name))
        drawn = np.zeros(everyone, dtype=bool)
        drawn[indices] = True
        return drawn[self.n_records :]

    def join(self, name: str, total: ExactSum, *, stage: str, rate: float) -> ExactSum:
        """The sum with the canaries that are in.

        Args:
            name: Name of the release.
            total: The exact sum over all real records.
            stage: The plan's stage.
            rate: Its Poisson rate.
        """
        flat = torch.cat([part.cpu().flatten() for part in total.units])
        places = self.coordinates(stage, len(flat))
        present = (self.coins() & self.sampled(name, rate))[: len(places)]
        raw = torch.tensor([[RAW_NORM * total.sensitivity]], dtype=torch.float64)
        (clipped,) = Clip(bound=total.sensitivity, mode="flat").sum([raw]).units
        # a sum's grid may be finer than the one that belongs to its sensitivity
        units = int(float(clipped) * grid_step(total.sensitivity) / total.step)
        flat[torch.from_numpy(places[present])] += units
        sizes = [part.numel() for part in total.units]
        parts = [
            joined.view(part.shape)
            for joined, part in zip(flat.split(sizes), total.units, strict=True)
        ]
        return ExactSum(units=parts, step=total.step, sensitivity=total.sensitivity)

    def note(
        self, name: str, noisy: Sequence[Tensor], *, total: ExactSum, stage: str, rate: float
    ) -> None:
        """Keeps what a release tells of the canaries, in units of the sensitivity.

        Args:
            name: Name of the release.
            noisy: What is released.
            total: The exact sum over all real records, which an attacker may know.
            stage: The plan's stage.
            rate: Its Poisson rate.
        """
        seen = torch.cat([part.double().flatten() for part in noisy])
        known = torch.cat([part.flatten() for part in total.values()])
        places = self.coordinates(stage, len(seen))
        shown = np.zeros(len(places), OBSERVATION)
        shown["seen"] = (seen - known)[torch.from_numpy(places)].numpy() / total.sensitivity
        shown["drawn"] = self.sampled(name, rate)[: len(places)]
        self.keep(name, shown)

    def keep(self, name: str, shown: np.ndarray) -> None:
        """Keeps what :meth:`note` found of one release."""
        path = Path(self.folder) / (name.replace("/", "-") + ".npy")
        write_array(path, shown, mode=0o600)

    def prepare(self) -> None:
        """Makes the folder and keeps the coins there."""
        Path(self.folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_array(Path(self.folder) / COINS, self.coins(), mode=0o600)
