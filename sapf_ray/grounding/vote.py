"""Private prompt assignment: each class gets the prompt whose images look most like its records.

Each record gives one vote, in its class's row, to the candidate whose mean is nearest. Adding or
removing a record moves one cell of the table by one, so the whole table has L2 sensitivity 1. It
is released once, with Gaussian noise; which prompt each class gets follows from that: the
assignment of different prompts with the most noisy votes in all.

References:
    1. Lin et al. Differentially private synthetic data via foundation model APIs 1: Images. ICLR
       2024. (the same histogram, over images)
    2. Kuhn. The Hungarian method for the assignment problem. 1955.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import DataError
from sapf_ray.grounding.candidates import show_candidates
from sapf_ray.grounding.space import Whitening
from sapf_ray.latents import LatentCache
from sapf_ray.privacy.fixed_point import ONE_VOTE, ExactSum
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs.context import RunContext
from sapf_ray.stages import Stage

SENSITIVITY = 1.0
RELEASE = "vote"


def assign_prompts(run: RunContext) -> dict[str, Any]:
    """The remedy ``vote``: makes its release; returns what ``grounding.json`` is to hold."""
    features = run.features
    assert features is not None
    prompts, shown = show_candidates(run, features)
    n_classes = len(run.source.class_names)
    whiten = Whitening.of(shown)
    parts = run.vote_parts
    table = vote_table(
        LatentCache(str(run.latents)).record_features(),
        whiten(shown).mean(1),
        whiten=whiten,
        n_classes=n_classes,
        parts=parts,
    )
    whole = 1 if parts is None else ONE_VOTE
    chosen = assignment(release_table(table, run.releaser, whole=whole))
    return {
        "prompts": {
            name: prompts[candidate]
            for name, candidate in zip(run.source.class_names, chosen, strict=True)
        },
        "candidates": len(prompts),
    }


def vote_table(
    records: Iterable[tuple[np.ndarray, np.ndarray]],
    candidates: np.ndarray,
    *,
    whiten: Whitening,
    n_classes: int,
    parts: np.ndarray | None = None,
) -> np.ndarray:
    """The exact votes: sensitive.

    Args:
        records: Blocks of features (n, d) and labels (n,) in [0, n_classes); a record with the
            label ``SKIPPED``, or whose features are not finite, has no vote.
        candidates: (m, d) whitened means; among equally near ones the first gets the vote.
        whiten: The map into their space.
        n_classes: Number of classes.
        parts: int64 of each record in its group's one vote (:meth:`Units.parts`), in the records'
            order; None where each record has a vote of its own.

    Returns:
        int64 (n_classes, m).
    """
    squares = np.square(candidates).sum(1)
    table = np.zeros((n_classes, len(candidates)), np.int64)
    first = 0
    for features, labels in records:
        mine = slice(first, first + len(labels))
        first += len(labels)
        votes = (labels != SKIPPED) & np.isfinite(features).all(1)
        own = labels[votes]
        if len(own) and not 0 <= own.min() <= own.max() < n_classes:
            raise DataError(f"a record's label lies outside [0, {n_classes})")
        nearest = (squares - 2 * whiten(features[votes]) @ candidates.T).argmin(1)
        np.add.at(table, (own, nearest), 1 if parts is None else parts[mine][votes])
    return table


def release_table(table: np.ndarray, releaser: Releaser, *, whole: int = 1) -> np.ndarray:
    """The votes with noise, float64 (classes, candidates): the only way from exact votes on.

    Args:
        table: From :func:`vote_table`.
        releaser: Its plan's ``vote`` fixes the noise.
        whole: What one vote is in the table, a power of two.

    Raises:
        BudgetError: The release would pass the planned epsilon; nothing has been released.
    """
    units = torch.from_numpy(table) * (ONE_VOTE // whole)
    total = ExactSum.of([units], SENSITIVITY)
    (noisy,) = releaser.gaussian(RELEASE, total, stage=Stage.VOTE)
    return noisy.numpy()


def assignment(noisy: np.ndarray) -> list[int]:
    """A candidate of its own for each class, with the most noisy votes in all."""
    _, chosen = linear_sum_assignment(noisy, maximize=True)
    return [int(candidate) for candidate in chosen]
