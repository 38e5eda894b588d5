"""How the exact sum becomes a private choice of matrices (paper Figure 6); a mechanism is a row of
:data:`MECHANISMS`.

Adjacency is adding or removing one record, or zeroing it out. C is the clipping norm, u the sum of
the records' contributions, k the number of matrices to keep. The paper names the alternatives and
gives no details; parameters and proofs are ours.

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
from typing import TYPE_CHECKING

from sapf_ray.registry import Registry
from sapf_ray.saliency.scores import Score, random_values

if TYPE_CHECKING:
    from torch import Tensor

    from sapf_ray.privacy.fixed_point import ExactSum
    from sapf_ray.privacy.release import Releaser


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a mechanism releases.

    Args:
        values: (K,) whose largest n are kept.
        released: Whether the values themselves are covered by the event, and not only who is
            largest.
        passed: Outcome of the test; None where there is none.
    """

    values: Tensor
    released: bool
    passed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One choice that a mechanism is to make.

    Args:
        name: Name of the release in the ledger.
        total: The exact sum of the records' contributions.
        n: Number of matrices to keep.
        score: How the sum ranks the matrices.
        releaser: Pays and draws.
        seed: Seed of a public random choice.
    """

    name: str
    total: ExactSum
    n: int
    score: Score
    releaser: Releaser
    seed: int


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One mechanism.

    Args:
        order: Order of the norm of a record's contribution that clipping bounds, 2 or infinity.
        choose: From the exact sum to the choice, through the releaser.
    """

    order: float
    choose: Callable[[Question], Choice]


def _gaussian(question: Question) -> Choice:
    noisy = question.releaser.gaussian(question.name, question.total, stage="selection")
    return Choice(values=question.score.rank(noisy), released=True)


def _exponential(question: Question) -> Choice:
    drawn = question.releaser.exponential(
        question.name, question.total, stage="selection", n=question.n
    )
    return _of_positions(drawn, question)


def _propose_test_release(question: Question) -> Choice:
    kept, passed = question.releaser.propose_test(
        question.name, question.total, stage="selection", n=question.n
    )
    if kept is None:
        values = random_values(question.total.units[0].numel(), question.seed)
        return Choice(values=values, released=False, passed=False)
    return _of_positions(kept, question, passed=passed)


def _of_positions(kept: list[int], question: Question, passed: bool | None = None) -> Choice:
    """A choice that releases who is kept and nothing else, unless the run is not private at all."""
    import torch

    if question.releaser.plan.non_private:
        (values,) = question.total.values()
        return Choice(values=values, released=True, passed=passed)
    values = torch.zeros(question.total.units[0].numel())
    values[kept] = torch.arange(len(kept), 0, -1, dtype=torch.float32)
    return Choice(values=values, released=False, passed=passed)


MECHANISMS: Registry[Mechanism] = Registry(
    "saliency.mechanism",
    {
        "gaussian": Mechanism(order=2.0, choose=_gaussian),
        "exponential": Mechanism(order=math.inf, choose=_exponential),
        "propose_test_release": Mechanism(order=math.inf, choose=_propose_test_release),
    },
)
