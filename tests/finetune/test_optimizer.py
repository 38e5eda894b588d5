"""One noise draw per release, whatever the number of workers (design rules 4 and 5)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn

from sapf_ray.finetune.loop import assert_ranks_agree
from sapf_ray.finetune.optimizer import ReleaseOptimizer
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.noise import add_gaussian_noise
from tests.finetune.workers import run_ranks

SIGMA, C, B, STEPS, SIZE = 1.7, 0.5, 8, 60, 400


class NoNoise(ReleaseOptimizer):
    """Broken twin: the sum is released as it is."""

    def add_noise(self) -> None:
        for p in self.params:
            p.grad = p.summed_grad


class NoisePerRank(ReleaseOptimizer):
    """Broken twin: every rank adds a draw of its own before the sum."""

    def add_noise(self) -> None:
        for p in self.params:
            p.grad = p.summed_grad + SIGMA * C * torch.randn(p.shape)


class NoiseAfterReduceOnRankZero(ReleaseOptimizer):
    """Broken twin, as in the paper's code: noise on the main process only, after gradients are
    synchronised.
    """

    def reduce_gradients(self) -> None:
        for p in self.params:
            p.grad = p.summed_grad
        super().reduce_gradients()
        if self.rank == 0:
            for p in self.params:
                p.grad = p.grad + SIGMA * C * torch.randn(p.shape)

    def add_noise(self) -> None:
        pass


class NoiseScaledByBatch(ReleaseOptimizer):
    """Broken twin: the divisor is applied before the noise, so the noise is B times too small after
    the sum.
    """

    def add_noise(self) -> None:
        super().add_noise()
        for p in self.params:
            p.grad = p.summed_grad + (p.grad - p.summed_grad) / math.sqrt(B)


def noise_of_steps(kind: type[ReleaseOptimizer], check_ranks: bool = True) -> torch.Tensor:
    """Runs STEPS steps without a single record; SGD at rate 1 shows exactly what was released,
    times B.
    """
    parameter = nn.Parameter(torch.zeros(SIZE))
    torch.manual_seed(100 + dist.get_rank())
    key = NoiseKey.create(7)
    recorded: list[int] = []
    optimizer = kind(
        torch.optim.SGD([parameter], lr=1.0),
        noise_multiplier=SIGMA,
        clipping="flat",
        clipping_norm=C,
        clipping_gamma=1e-3,
        expected_batch_size=B,
        before_release=recorded.append,
        noise_stream=lambda step: key.stream("finetune/noise", step),
    )
    released = []
    for _ in range(STEPS):
        before = parameter.detach().clone()
        optimizer.release_step()
        released.append((before - parameter.detach()) * B)
    if check_ranks:
        assert_ranks_agree({"p": parameter})
    if kind is ReleaseOptimizer:
        assert recorded == (list(range(STEPS)) if dist.get_rank() == 0 else [])
    return torch.stack(released)


def variance_is_right(released: torch.Tensor) -> bool:
    """Chi-square test of the variance against (sigma C)^2 at the 1e-6 level."""
    statistic = float((released / (SIGMA * C)).square().sum())
    p = stats.chi2.cdf(statistic, released.numel())
    return 5e-7 < p < 1 - 5e-7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_noise_is_the_same_release_for_any_number_of_workers(world, tmp_path):
    ranks = run_ranks(world, tmp_path / "r", noise_of_steps, ReleaseOptimizer)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    assert variance_is_right(ranks[0])
    key = NoiseKey.create(7)
    for step in (
        0,
        STEPS - 1,
    ):  # fixed-seed identity: exactly the keyed draw of that step, nothing else
        expected = add_gaussian_noise(
            [torch.zeros(SIZE)], SIGMA, C, key.stream("finetune/noise", step)
        )[0]
        torch.testing.assert_close(ranks[0][step], expected, rtol=1e-4, atol=1e-4)
    steps = ranks[0]
    correlation = torch.corrcoef(steps)[~torch.eye(STEPS, dtype=torch.bool)]
    assert correlation.abs().max() < 6 / math.sqrt(SIZE)  # no step repeats another's noise


@pytest.mark.parametrize("twin", [NoNoise, NoisePerRank, NoiseScaledByBatch])
def test_broken_twins_are_rejected(twin, tmp_path):
    ranks = run_ranks(2, tmp_path / "r", noise_of_steps, twin, False)
    assert not variance_is_right(ranks[0])


def test_ranks_that_drift_apart_are_caught(tmp_path):
    with pytest.raises(Exception, match="ranks disagree"):
        run_ranks(2, tmp_path / "r", noise_of_steps, NoiseAfterReduceOnRankZero)
