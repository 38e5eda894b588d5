"""The score of one trial of a private choice: how many held-out records a classifier gets right.

The classifiers that ``evaluation`` names learn from the trial's synthetic images alone, which are
post-processing of what the trial paid for. Then each held-out record adds 1, or the share of the
classifiers that are right, and adding or removing one moves the sum by at most that much: one
Gaussian release of sensitivity 1 goes through the releaser into the trial's ledger.
"""

from __future__ import annotations

import numpy as np
import ray
import torch

from sapf_ray import cluster
from sapf_ray.data.base import SKIPPED
from sapf_ray.data.held_out import WithoutHeldOut
from sapf_ray.evaluation.downstream import fit, predicted
from sapf_ray.evaluation.inputs import SYNTHETIC, Inputs
from sapf_ray.evaluation.protocols import protocol_of
from sapf_ray.models.device import pick_device
from sapf_ray.privacy.fixed_point import ONE_VOTE, ExactSum
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs import worktime
from sapf_ray.runs.context import RunContext
from sapf_ray.stages import Stage

SENSITIVITY = 1.0
RELEASE = "score"
TOGETHER = 256
"""Records that a classifier sees together, always: a sum of floats in it must not depend on how
many others there are."""


def score_trial(run: RunContext) -> float:
    """Makes the release.

    Returns:
        The noisy number of held-out records that are classified rightly.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    source = run.source
    assert isinstance(source, WithoutHeldOut)
    config = run.config.evaluation
    made = run.config.synthesis.side(run.model.resolution)
    inputs = Inputs(
        synthetic_dir=str(run.directory.synthetic),
        source=source.source,
        resolution=config.compared_at(source.resolution, made),
        config=config,
        seed=run.config.seed,
    ).restricted_to([SYNTHETIC])
    task = _votes.options(
        name="score", num_cpus=max(1.0, config.cpus_per_task), num_gpus=config.gpus
    )
    votes = cluster.result(task.remote(inputs, source.held_out))
    return release_score(votes, run.releaser)


def release_score(votes: np.ndarray, releaser: Releaser) -> float:
    """The sum of the votes with noise: the only way from exact votes on.

    Args:
        votes: int64 (n,) in [0, ONE_VOTE], one a record.
        releaser: Its plan's ``score`` fixes the noise.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    total = ExactSum.of([torch.tensor([int(votes.sum())])], SENSITIVITY)
    (noisy,) = releaser.gaussian(RELEASE, total, stage=Stage.SCORE)
    return float(noisy)


@ray.remote(max_retries=3)
@worktime.timed
def _votes(inputs: Inputs, held_out: np.ndarray) -> np.ndarray:
    return votes_of(inputs, held_out)


def votes_of(inputs: Inputs, held_out: np.ndarray) -> np.ndarray:
    """Each held-out record's part of the sum: sensitive.

    Args:
        inputs: Synthetic images to learn from, and the source that has the records.
        held_out: int64 (n,) positions among its training images.

    Returns:
        int64 (n,) in [0, ONE_VOTE]: the share of the classifiers that are right, rounded down; 0
        for a record that cannot be read.
    """
    config = inputs.config
    device = pick_device(config.gpus)
    n_classes = len(inputs.class_names)
    correct = np.zeros(len(held_out), np.int64)
    models = [
        fit(
            protocol_of(config).recipe(config, name, inputs.task),
            inputs.synthetic,
            n_classes=n_classes,
            seed=inputs.seed,
            device=device,
        )
        for name in config.classifiers
    ]
    for start in range(0, len(held_out), TOGETHER):
        rows = held_out[start : start + TOGETHER]
        images, labels = inputs.source.read("train", rows, resolution=inputs.resolution)
        for model in models:
            right = (predicted(model, images, device=device) == labels) & (labels != SKIPPED)
            correct[start : start + TOGETHER] += right
    return correct * (ONE_VOTE // len(models))
