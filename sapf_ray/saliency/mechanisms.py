"""How the exact sum becomes a private choice of matrices (paper Figure 6); a mechanism is a row of
:data:`MECHANISMS`.

Adjacency is adding or removing one record. C is the clipping norm, u the sum of the records'
contributions, k the number of matrices to keep. The paper names the alternatives and gives no
details; parameters and proofs are ours.

``gaussian`` (paper, Theorem 1). A record's contribution has L2 norm at most C, so u + N(0, (sigma
C)^2) is the Gaussian mechanism with noise multiplier sigma. Ranking it is post-processing.

``exponential`` [1]. A record contributes K numbers in [0, C]. k matrices are drawn one after the
other, without replacement, with probability proportional to exp(e u_j / C). No factor 1/2 in the
exponent: all numbers are non-negative, so adding a record changes every u_j by between 0 and C, the
log-odds of any two matrices by at most e, and the log-probability of each by at most e (numerator
and normaliser move the same way). Each draw is e-DP, also given the earlier ones. Drawing so is the
same as adding independent Gumbel noise of scale C / e to u once and keeping the k largest [2, Lemma
4.2]. What k draws cost together: an e-DP mechanism is mu-GDP with mu = -2 Phi^-1(1 / (1 + exp(e)))
(its trade-off function lies above the polygon through (0, 1), (v, v), (1, 0), v = 1 / (1 + exp(e));
the Gaussian's passes through these points and is convex, so it lies below [3, section 2]), and k
adaptive mu-GDP draws are sqrt(k) mu-GDP [3, Corollary 3.3]. So the selection costs what one
Gaussian release with noise multiplier sigma costs when mu = 1 / (sigma sqrt(k)), which gives e. The
plan needs no k, and both accountants price it exactly as the Gaussian. The draws are even of
bounded range e [2], under which about 2 e would do; the proof we know is for pure composition, so
we do not use it.

``propose_test_release`` [4]. The top k of u are released as they are, if the gap between the k-th
and the (k+1)-th value passes a noisy test: gap + Lap(C / e) > C (1 + log(1 / 2 delta) / e).
Contributions lie in [0, C], so any order statistic of u, and the gap with it, moves by at most C in
the same direction, the gap itself by at most C: the test alone is e-DP. If a neighbour has another
top k, the gap is at most C (some a in one set and b in the other swap order, so gap <= u_a - u_b <=
v_b - v_a <= C), and the test passes with probability at most P(Lap(C / e) > C log(1 / 2 delta) / e)
= delta. If all neighbours have the same top k, the outcome is a function of the test. Hence (e,
delta)-DP, e = 1 / noise multiplier, delta = ``saliency.delta_share`` of the plan's. Where the test
fails the matrices are drawn at random from the public seed.

1. McSherry, Talwar, "Mechanism design via differential privacy", FOCS 2007.
2. Durfee, Rogers, "Practical differentially private top-k selection with pay-what-you-get
   composition", NeurIPS 2019.
3. Dong, Roth, Su, "Gaussian differential privacy", JRSS-B 2022.
4. Dwork, Lei, "Differential privacy and robust statistics", STOC 2009; for top-k, Zhu, Wang,
   "Adaptive private-k-selection with adaptive k and application to multi-label PATE", AISTATS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from sapf_ray.privacy.keyed_rng import NoiseStream
from sapf_ray.privacy.noise import add_gaussian_noise, add_gumbel_noise, add_laplace_noise
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.saliency.scores import Release, Score


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a mechanism lets out.

    Attributes:
        values: (K,) whose largest n are kept.
        released: Whether the values themselves are covered by the event, and not only who is
            largest.
        passed: Outcome of the test; None where there is none.
    """

    values: Tensor
    released: bool
    passed: bool | None = None


@dataclass(frozen=True)
class Mechanism:
    """One mechanism.

    Attributes:
        order: Of the norm of a record's contribution that clipping bounds.
        choose: (exact sum, score, stage, C, n, stream, public seed) to the choice; the one place
            where noise is drawn.
    """

    order: float
    choose: Callable[[Release, Score, StagePlan, float, int, NoiseStream, int], Choice]


def _gaussian(
    total: Release,
    score: Score,
    stage: StagePlan,
    bound: float,
    n: int,
    stream: NoiseStream,
    seed: int,
) -> Choice:
    noisy = add_gaussian_noise(
        total, stage.noise_multiplier, bound, stream, non_private=stage.noise_multiplier == 0
    )
    return Choice(values=score.rank(noisy), released=True)


def _exponential(
    total: Release,
    score: Score,
    stage: StagePlan,
    bound: float,
    n: int,
    stream: NoiseStream,
    seed: int,
) -> Choice:
    (utility,) = total
    if stage.noise_multiplier == 0:
        return Choice(values=utility, released=True)
    epsilon = draw_epsilon(stage.noise_multiplier, n)
    return Choice(values=add_gumbel_noise(utility, 1 / epsilon, bound, stream), released=False)


def _propose_test_release(
    total: Release,
    score: Score,
    stage: StagePlan,
    bound: float,
    n: int,
    stream: NoiseStream,
    seed: int,
) -> Choice:
    (utility,) = total
    if stage.noise_multiplier == 0 or n == len(utility):
        return Choice(values=utility, released=stage.noise_multiplier == 0, passed=True)
    ordered = utility.double().sort(descending=True).values
    gap = ordered[n - 1] - ordered[n]
    threshold = bound * (1 + stage.noise_multiplier * math.log(1 / (2 * stage.delta)))
    passed = bool(add_laplace_noise(gap, stage.noise_multiplier, bound, stream) > threshold)
    values = utility if passed else random_values(len(utility), seed)
    return Choice(values=values, released=False, passed=passed)


def draw_epsilon(noise_multiplier: float, n: int) -> float:
    """Epsilon of each of n exponential draws that together are 1 / noise_multiplier-GDP.

    Example:
        >>> round(draw_epsilon(25.0, 29), 5)
        0.00593
    """
    half = 1 / (2 * noise_multiplier * math.sqrt(n))
    return float(norm.logcdf(half) - norm.logsf(half))


def random_values(n: int, seed: int) -> Tensor:
    """(n,) public random values: what is kept where no data are looked at."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


MECHANISMS: dict[str, Mechanism] = {
    "gaussian": Mechanism(2.0, _gaussian),
    "exponential": Mechanism(math.inf, _exponential),
    "propose_test_release": Mechanism(math.inf, _propose_test_release),
}
