"""One noise draw per release, whatever the number of workers (design rules 4 and 5)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn

from sapf_ray.finetune.loop import assert_ranks_agree
from sapf_ray.finetune.optimizer import Clipping, ReleaseOptimizer
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan
from sapf_ray.privacy.release import Releaser
from tests.finetune.workers import run_ranks

SIGMA, C, B, STEPS, SIZE = 1.7, 0.5, 8, 60, 400


def make_releaser(directory: Path, slack: float = 0.0) -> Releaser:
    """Pays STEPS releases with noise multiplier SIGMA from a ledger in ``directory``."""
    stage = StagePlan(noise_multiplier=SIGMA, sample_rate=0.5, count=STEPS, share=1.0, slack=slack)
    plan = PrivacyPlan(
        epsilon=1e3,
        delta=1e-3,
        accountant="rdp",
        n_records=2 * B,
        batch_size=B,
        sample_rate=0.5,
        steps=STEPS,
        selection=None,
        finetune=stage,
        composed_epsilon=1e3,
    )
    path = directory / "ledger.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        Ledger.create(path, plan)
    return Releaser(key=NoiseKey.create(7).bind("run"), ledger=Ledger.open(path), plan=plan)


class NoNoise(ReleaseOptimizer):
    """Broken twin: the sum is released as it is."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        return total.values()


class NoisePerRank(ReleaseOptimizer):
    """Broken twin: every rank adds a draw of its own before the sum."""

    def release_step(self) -> None:
        noise = SIGMA * C * torch.randn(self._sum.shape)
        self._sum += (noise / self.grid).to(torch.int64)
        super().release_step()

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        return total.values()


class NoiseAfterReduceOnRankZero(ReleaseOptimizer):
    """Broken twin, as in the paper's code: noise on the main process only, after gradients are
    synchronised.
    """

    def _noisy_sum(self) -> torch.Tensor:
        dist.all_reduce(self._sum)
        total = self._sum.float() * self.grid
        if dist.get_rank() == 0:
            total += SIGMA * C * torch.randn(total.shape)
        return total


class NoiseScaledByBatch(ReleaseOptimizer):
    """Broken twin: the noise is too small by the square root of B."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        return [
            clean + (noisy - clean) / math.sqrt(B)
            for clean, noisy in zip(total.values(), super().release(total), strict=True)
        ]


class NoiseHalved(ReleaseOptimizer):
    """Broken twin: half of the noise."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        return [
            (clean + noisy) / 2
            for clean, noisy in zip(total.values(), super().release(total), strict=True)
        ]


def noise_of_steps(
    kind: type[ReleaseOptimizer], directory: Path, check_ranks: bool = True, slack: float = 0.0
) -> torch.Tensor:
    """Runs STEPS steps without a single record; SGD at rate 1 shows exactly what was released,
    times B.
    """
    parameter = nn.Parameter(torch.zeros(SIZE))
    torch.manual_seed(100 + dist.get_rank())
    if dist.get_rank() == 0:
        make_releaser(directory)
    dist.barrier()
    optimizer = kind(
        torch.optim.SGD([parameter], lr=1.0),
        clipping=Clipping(norm=C, mode="flat"),
        grid=grid_step(C),
        expected_batch_size=B,
        releaser=make_releaser(directory, slack),
    )
    released = []
    for _ in range(STEPS):
        parameter.data.zero_()
        optimizer.release_step()
        released.append(-parameter.detach() * B)
    if check_ranks:
        assert_ranks_agree({"p": parameter})
    return torch.stack(released)


def variance_is_right(released: torch.Tensor, slack: float = 0.0) -> bool:
    """Chi-square test of the variance against (sigma C)^2 at the 1e-6 level."""
    statistic = float((released / (SIGMA * C * (1 + slack))).square().sum())
    p = stats.chi2.cdf(statistic, released.numel())
    return 5e-7 < p < 1 - 5e-7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_noise_is_the_same_release_for_any_number_of_workers(world, tmp_path):
    """One keyed draw a step, paid once, whoever is there."""
    ranks = run_ranks(world, tmp_path / "r", noise_of_steps, ReleaseOptimizer, tmp_path / "run")
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    assert variance_is_right(ranks[0])
    events = Ledger.open(tmp_path / "run" / "ledger.jsonl").events()
    assert [e.release for e in events] == [f"finetune/step/{i}" for i in range(STEPS)]
    releaser = make_releaser(tmp_path / "run")
    total = ExactSum.zeros([(SIZE,)], C)
    for step in (0, STEPS - 1):  # exactly the keyed draw of that step, nothing else
        (expected,) = releaser.gaussian(f"finetune/step/{step}", total, stage="finetune")
        torch.testing.assert_close(ranks[0][step], expected.float(), rtol=1e-6, atol=1e-7)
    correlation = torch.corrcoef(ranks[0])[~torch.eye(STEPS, dtype=torch.bool)]
    assert correlation.abs().max() < 6 / math.sqrt(SIZE)  # no step repeats another's noise


def test_noise_grows_by_the_slack_of_the_plan(tmp_path):
    (released,) = run_ranks(
        1, tmp_path / "r", noise_of_steps, ReleaseOptimizer, tmp_path / "run", True, 0.5
    )
    assert variance_is_right(released, slack=0.5)
    assert not variance_is_right(released)


def added_up(units: list[list[int]], directory: Path) -> torch.Tensor:
    """What is released of these micro-batches, dealt to the ranks in turn."""
    parameter = nn.Parameter(torch.zeros(len(units[0])))
    if dist.get_rank() == 0:
        make_releaser(directory)
    dist.barrier()
    optimizer = ReleaseOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        clipping=Clipping(norm=C, mode="flat"),
        grid=grid_step(C),
        expected_batch_size=B,
        releaser=make_releaser(directory),
    )
    for micro_batch in units[dist.get_rank() :: dist.get_world_size()]:
        optimizer.accumulate([torch.tensor(micro_batch)])
    optimizer.release_step()
    return parameter.detach()


def test_sums_over_ranks_are_exact_in_any_order(tmp_path):
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(-(2**20), 2**20, (11, 1000), generator=generator).tolist()
    results = [
        run_ranks(world, tmp_path / f"r{i}", added_up, some, tmp_path / f"run{i}")[0]
        for i, (world, some) in enumerate([(1, units), (2, units), (3, units[::-1])])
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # broken twin: float32 sums round by their order
    floats = torch.tensor(units).float() * 1.1
    one_by_one = [sum(order) for order in (floats, floats.flip(0))]
    assert not torch.equal(*one_by_one)


@pytest.mark.parametrize("twin", [NoNoise, NoisePerRank, NoiseScaledByBatch, NoiseHalved])
def test_broken_twins_are_rejected(twin, tmp_path):
    ranks = run_ranks(2, tmp_path / "r", noise_of_steps, twin, tmp_path / "run", False)
    assert not variance_is_right(ranks[0])


def test_ranks_that_drift_apart_are_caught(tmp_path):
    with pytest.raises(Exception, match="ranks disagree"):
        run_ranks(2, tmp_path / "r", noise_of_steps, NoiseAfterReduceOnRankZero, tmp_path / "run")
