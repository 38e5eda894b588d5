"""Mechanism-level audits: each release on two neighbours that differ by one worst-case record.

The code that counts, clips and releases is the run's own; the data are made up, the ledger is in
memory. Where a release adds independent noise to each value, one release of R values that all are a
worst case is R runs of the release of one value; the others are run R times. A threshold is chosen
on half of the runs and counted on the other half (Clopper-Pearson), so the bound holds whatever the
mechanism is.

What these audits claim: a Gaussian release of noise sigma is 1/sigma-GDP, an exponential draw and
the test of propose-test-release are epsilon-DP. They are run at noise of their own, at which 10,000
runs can tell; a run's own sigma is seen by its canaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sapf_ray.audit.auditor import CanaryScoreAuditor
from sapf_ray.audit.bounds import clopper_pearson
from sapf_ray.audit.findings import Finding
from sapf_ray.audit.synthetic_run import MemoryLedger
from sapf_ray.evolution.histogram import count_votes, release_histogram
from sapf_ray.grounding.head import Weights, exact_sum
from sapf_ray.grounding.proportions import release_counts
from sapf_ray.grounding.space import Whitening
from sapf_ray.grounding.vote import release_table, vote_table
from sapf_ray.models.class_head import Projection
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser, draw_epsilon
from sapf_ray.privacy.stage_plan import StagePlan
from sapf_ray.privacy.tradeoff import gaussian_epsilon
from sapf_ray.stages import Stage

DELTA = 1e-3  # at which Gaussian releases are compared: 10,000 runs cannot resolve less
SIGMA = 1.0
TEST_EPSILON = 2.0
DRAW_SIGMA = 0.424  # one draw of the exponential mechanism at epsilon 2
BATCH = 250  # classes of one release


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Outcomes of one mechanism; the higher, the likelier with the record.

    Attributes:
        with_record: (R,).
        without: (R,).
    """

    with_record: np.ndarray
    without: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A row of :data:`MECHANISMS`.

    Attributes:
        run: Number of runs and a key to their outcomes.
        epsilon: What is claimed at ``delta``.
        delta: Of the claim.
        pair: The neighbours, in a few words.
    """

    run: Callable[[int, NoiseKey], Samples]
    epsilon: float
    delta: float
    pair: str


def audit_mechanism(
    name: str, *, runs: int, confidence: float, key: NoiseKey | None = None
) -> Finding:
    """One row.

    Args:
        name: In :data:`MECHANISMS`.
        runs: R, on either neighbour.
        confidence: Of the bound.
        key: Of the draws; a new secret one unless given.
    """
    row = MECHANISMS[name]
    found = row.run(runs, NoiseKey.create() if key is None else key)
    auditor = CanaryScoreAuditor(found.with_record, found.without)
    shown = auditor.epsilon_clopper_pearson(delta=row.delta, confidence=confidence)
    return Finding(
        audit=f"mechanism: {name}",
        quantity="ε",
        claim=row.epsilon,
        shown=shown,
        falsified=shown > row.epsilon,
        confidence=confidence,
        ceiling=_ceiling(runs // 2, delta=row.delta, confidence=confidence),
        note=f"{row.pair}; {runs:,} runs each, at δ = {row.delta:g}",
    )


def _ceiling(runs: int, *, delta: float, confidence: float) -> float:
    """What runs that a test tells apart without an error show."""
    each = 1 - (1 - confidence) / 2
    low, _ = clopper_pearson(runs, runs, confidence=each)
    _, high = clopper_pearson(0, runs, confidence=each)
    return math.log((low - delta) / high)


# The releases -----------------------------------------------------------------------------------


def _releaser(
    key: NoiseKey,
    stage: str,
    *,
    noise: float = SIGMA,
    mechanism: str = "gaussian",
    delta: float = 0,
) -> Releaser:
    planned = StagePlan(
        noise_multiplier=noise,
        sample_rate=1.0,
        count=1,
        share=None,
        mechanism=mechanism,
        delta=delta,
    )
    stages: dict[str, StagePlan | None] = {Stage.SELECTION: None, Stage.FINETUNE: None}
    plan = PrivacyPlan(
        epsilon=math.inf,
        delta=DELTA,
        accountant="pld",
        n_records=1000,
        batch_size=0,
        sample_rate=0.0,
        steps=0,
        composed_epsilon=math.inf,
        **{**stages, stage: planned},  # type: ignore[arg-type]
    )
    return Releaser(key=key, ledger=MemoryLedger(), plan=plan)  # type: ignore[arg-type]


def _both(run: Callable[[NoiseKey, bool], np.ndarray], key: NoiseKey) -> Samples:
    return Samples(with_record=run(key.bind("with"), True), without=run(key.bind("without"), False))


def _in_batches(
    runs: int, key: NoiseKey, run: Callable[[NoiseKey, bool, int], np.ndarray]
) -> Samples:
    """For releases whose time grows with the square of the number of classes."""

    def all_runs(key: NoiseKey, present: bool) -> np.ndarray:
        sizes = [min(BATCH, runs - start) for start in range(0, runs, BATCH)]
        return np.concatenate([run(key.bind(i), present, n) for i, n in enumerate(sizes)])

    return _both(all_runs, key)


def _gaussian(runs: int, key: NoiseKey) -> Samples:
    """A gradient of a thousand times the bound, clipped."""

    def run(key: NoiseKey, present: bool) -> np.ndarray:
        clip = Clip(bound=0.5, mode="flat")
        record = torch.full((1, 1), 500.0, dtype=torch.float64)
        (units,) = clip.sum([record if present else record[:0]]).units
        total = ExactSum.of([units.expand(runs).clone()], clip.bound)
        (noisy,) = _releaser(key, Stage.FINETUNE).gaussian("finetune/0", total, stage="finetune")
        return noisy.numpy() / clip.bound

    return _both(run, key)


def _vote(runs: int, key: NoiseKey) -> Samples:
    """A class for each run, one candidate; the record is the class's only one."""

    def run(key: NoiseKey, present: bool) -> np.ndarray:
        features, labels = np.ones((runs, 2), np.float32), np.arange(runs)
        whiten = Whitening(np.eye(2))
        blocks = [(features, labels)] if present else []
        table = vote_table(blocks, np.zeros((1, 2)), whiten=whiten, n_classes=runs)
        return release_table(table, _releaser(key, Stage.VOTE))[:, 0]

    return _both(run, key)


def _histogram(runs: int, key: NoiseKey) -> Samples:
    """A class for each run, one candidate; the record is the class's only one."""

    def run(key: NoiseKey, present: bool, classes: int) -> np.ndarray:
        n = classes if present else 0
        votes = count_votes(
            np.zeros((classes, 1), np.float32),
            classes,
            embeddings=np.ones((n, 1), np.float32),
            labels=np.arange(n),
        )
        return release_histogram(votes, 0, _releaser(key, Stage.EVOLUTION))

    return _in_batches(runs, key, run)


def _proportions(runs: int, key: NoiseKey) -> Samples:
    """A class for each run; the record is the class's only one."""

    def run(key: NoiseKey, present: bool) -> np.ndarray:
        labels = np.arange(runs if present else 0)
        return release_counts(labels, runs, releaser=_releaser(key, Stage.PROPORTIONS))

    return _both(run, key)


def _head(runs: int, key: NoiseKey) -> Samples:
    """A class for each run; the record's features are on the radius.

    Its squared norm goes into one number that all classes share and is left out here: the record
    then moves the rest by all but 1 % of the sensitivity.
    """
    size = 4
    projection = Projection(
        centre=np.zeros(size), directions=np.eye(size), radius=1.0, kind="made up"
    )
    weights = Weights.of(size)
    direction = np.append(np.full(size, weights.sums / math.sqrt(size)), weights.count)

    def run(key: NoiseKey, present: bool, classes: int) -> np.ndarray:
        n = classes if present else 0
        features = np.full((n, size), 100.0, np.float32)
        total = exact_sum([(features, np.arange(n))], projection, n_classes=classes)
        sums, counts, _ = _releaser(key, Stage.HEAD).gaussian("head", total, stage=Stage.HEAD)
        seen = np.concatenate([sums.numpy(), counts.numpy()[:, None]], axis=1)
        return seen @ direction / np.linalg.norm(direction)

    return _in_batches(runs, key, run)


def _exponential(runs: int, key: NoiseKey) -> Samples:
    """The first of two matrices leads by C, the record adds C to the second; which one is drawn.

    With the record either is drawn half of the time, whatever the noise.
    """
    bound = 1.0

    def run(key: NoiseKey, present: bool) -> np.ndarray:
        utility = torch.tensor([bound, bound if present else 0.0]).double()
        total = ExactSum.rounded([utility], bound)
        releaser = _releaser(key, Stage.SELECTION, noise=DRAW_SIGMA, mechanism="exponential")
        drawn = [
            releaser.exponential(f"selection/{i}", total, stage="selection", n=1)[0]
            for i in range(runs)
        ]
        return np.array(drawn, dtype=np.float64)

    return _both(run, key)


def _propose_test(runs: int, key: NoiseKey) -> Samples:
    """The record widens the gap by C, to where the test passes half of the time."""
    bound, tiny = 1.0, 1e-6

    def run(key: NoiseKey, present: bool) -> np.ndarray:
        threshold = bound + bound / TEST_EPSILON * math.log(1 / (2 * tiny))
        gap = threshold - (0.0 if present else bound)
        total = ExactSum.rounded([torch.tensor([gap, 0.0]).double()], bound)
        releaser = _releaser(
            key,
            Stage.SELECTION,
            noise=1 / TEST_EPSILON,
            mechanism="propose_test_release",
            delta=tiny,
        )
        passed = [
            releaser.propose_test(f"selection/{i}", total, stage="selection", n=1)[1]
            for i in range(runs)
        ]
        return np.array(passed, dtype=np.float64)

    return _both(run, key)


_GAUSSIAN_EPSILON = gaussian_epsilon(1 / SIGMA, DELTA)

MECHANISMS: dict[str, Mechanism] = {
    "gaussian": Mechanism(
        run=_gaussian,
        epsilon=_GAUSSIAN_EPSILON,
        delta=DELTA,
        pair="one gradient of 1,000 C, clipped",
    ),
    "vote": Mechanism(run=_vote, epsilon=_GAUSSIAN_EPSILON, delta=DELTA, pair="one vote"),
    "histogram": Mechanism(run=_histogram, epsilon=_GAUSSIAN_EPSILON, delta=DELTA, pair="one vote"),
    "proportions": Mechanism(
        run=_proportions, epsilon=_GAUSSIAN_EPSILON, delta=DELTA, pair="one label"
    ),
    "head": Mechanism(
        run=_head, epsilon=_GAUSSIAN_EPSILON, delta=DELTA, pair="one record of 100 radii"
    ),
    "exponential": Mechanism(
        run=_exponential,
        epsilon=draw_epsilon(DRAW_SIGMA, 1),
        delta=0.0,
        pair="C for the other of two matrices",
    ),
    "propose_test_release": Mechanism(
        run=_propose_test, epsilon=TEST_EPSILON, delta=0.0, pair="a gap wider by C"
    ),
}
"""Name of a release to how it is audited."""


# Sums -------------------------------------------------------------------------------------------

MANY = 302_436  # records of the largest data set in the paper
SHARD = 512


def worst_contributions(n: int = MANY, width: int = 60) -> np.ndarray:
    """Contributions that make a float32 sum round up in each shard, and down in each where the
    first record is missing; float32 (n, width) of norm below 1.

    A shard sums up to half a unit in the last place of the running total. Its first two records
    are off by little: together upwards, and downwards where each shard begins one record later.
    """
    off = 2.0**-17
    values = np.empty(n)
    total = 0.0
    for number, start in enumerate(range(0, n, SHARD)):
        shard = values[start : start + SHARD]
        ulp = max(float(np.spacing(np.float32(total))), 2.0**-10)
        shard[:] = (np.floor(SHARD * 0.111 / ulp) + 0.5) * ulp / SHARD
        shard[0] -= 2 * number * off
        shard[1] += (2 * number + 1) * off
        total += float(shard.sum())
    return np.repeat(values[:, None].astype(np.float32), width, axis=1)


def clipped_sum(rows: np.ndarray) -> np.ndarray:
    """The product's way: clipped, on the grid, as integers; in units of the bound 1."""
    clip = Clip(bound=1.0, mode="flat")
    total = ExactSum.zeros([rows.shape[1:]], clip.bound)
    for start in range(0, len(rows), SHARD):
        total = total + clip.sum([torch.from_numpy(rows[start : start + SHARD])])
    return total.values()[0].numpy()


def audit_sums(summed: Callable[[np.ndarray], np.ndarray] = clipped_sum) -> Finding:
    """By how much one record of many moves a sum, in units of C: arithmetic, at most 1.

    Args:
        summed: (N, width) float32 contributions of norm at most 1 to their sum.
    """
    rows = worst_contributions()
    shown = float(np.linalg.norm(summed(rows) - summed(rows[1:])))
    return Finding(
        audit="sum over many records",
        quantity="C",
        claim=1.0,
        shown=shown,
        falsified=shown > 1 + grid_step(1.0),
        confidence=1.0,
        note=f"{MANY:,} records, one removed; a float32 sum moves by several C",
    )
