"""Canaries in the training loop itself: real gradients, workers and optimizer beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sapf_ray.audit.run import claim_of
from sapf_ray.audit.scores import Observed
from sapf_ray.audit.white_box import parts
from sapf_ray.finetune.loop import FinetuneJob, TrainState, train
from sapf_ray.finetune.optimizer import ReleaseOptimizer
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.ledger import Ledger
from tests.finetune.test_loop import STEPS, N, cache, make_job, same  # noqa: F401 a fixture
from tests.finetune.workers import run_ranks

M = 150


@pytest.fixture
def make(tiny_pipeline, cache, tmp_path):  # noqa: F811
    def made(name: str, **finetune) -> FinetuneJob:
        job = make_job(tiny_pipeline, cache, tmp_path / name, **finetune)
        canaries = Canaries(
            count=M, n_records=N, key=job.key, folder=str(tmp_path / name / "observations")
        )
        canaries.prepare()
        return dataclasses.replace(job, canaries=canaries)

    return made


def observed_by(job: FinetuneJob) -> list[Observed]:
    found = []
    for step in range(job.config.steps):
        shown = np.load(Path(job.canaries.folder) / f"finetune-step-{step}.npy")
        found.append(
            Observed(
                name=f"finetune/step/{step}",
                stage=job.plan.finetune,
                seen=shown["seen"],
                drawn=shown["drawn"],
            )
        )
    return found


def falsified(job: FinetuneJob) -> set[str]:
    claim = claim_of(Ledger.open(job.ledger))
    found = parts(observed_by(job), job.canaries.coins(), claim=claim)
    return {finding.audit for finding in found if finding.falsified}


@pytest.mark.long
def test_any_number_of_workers_shows_the_same_of_the_canaries_and_trains_the_same(make, tmp_path):
    one, two = make("one"), make("two")
    (alone,) = run_ranks(1, tmp_path / "r1", train, one)
    first, second = run_ranks(2, tmp_path / "r2", train, two)
    assert same(alone, first) and same(first, second)
    for a, b in zip(observed_by(one), observed_by(two), strict=True):
        assert np.array_equal(a.seen, b.seen) and len(a.seen) == M
    assert falsified(one) == set()
    assert len(Ledger.open(two.ledger).events()) == STEPS
    without = dataclasses.replace(make("none"), canaries=None)
    (plain,) = run_ranks(1, tmp_path / "r3", train, without)
    assert not same(plain, alone), "canaries take part in training"


class NoiseOfEachRank(ReleaseOptimizer):
    """Broken twin: the noise of a fourth rank alone, as if the others had added theirs."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        stage = self.releaser.plan.finetune
        quarter = dataclasses.replace(stage, noise_multiplier=stage.noise_multiplier / 4)
        plan = dataclasses.replace(self.releaser.plan, finetune=quarter)
        return dataclasses.replace(self.releaser, plan=plan).gaussian(
            f"finetune/step/{self.next_step}", total, stage="finetune"
        )


def train_with(job: FinetuneJob, kind: type[ReleaseOptimizer]) -> TrainState:
    with mock.patch("sapf_ray.finetune.loop.ReleaseOptimizer", kind):
        assert dist.get_world_size() == 1
        return train(job)


def test_a_quarter_of_the_noise_in_the_loop_is_falsified(make, tmp_path):
    job = make("job", steps=2)
    big = dataclasses.replace(job.plan, epsilon=1e3)
    Path(job.ledger).unlink()
    Ledger.create(job.ledger, big)
    run_ranks(1, tmp_path / "r", train_with, job, NoiseOfEachRank)
    assert falsified(job) == {"noise of the releases"}
