"""Which candidates become parents, and where each member of the next generation comes from.

All of it is post-processing of a noisy histogram, so its randomness is public: it comes from the
run's seed. Slot i of any generation has label i mod classes, as in
:class:`sapf_ray.synthesis.sampling_plan.SamplingPlan`: classes are equally frequent whatever their
shares among the records, which stay private.

References:
    1. Lin et al. ICLR 2024, algorithm 1. (sampling in proportion to thresholded votes)
    2. Xie et al. ICML 2024, algorithm 1. (ranking; parents kept beside their variations)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sapf_ray.config import EvolutionConfig
from sapf_ray.synthesis.sampling_plan import image_seed

Select = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def by_sampling(weights: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """``n`` indices drawn with replacement in proportion to ``weights`` (m,); uniformly when all
    are 0.
    """
    total = weights.sum()
    return generator.choice(len(weights), size=n, p=weights / total if total > 0 else None)


def by_rank(weights: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """The ``n`` heaviest, going round again where fewer have weight; a random choice when all are
    0.
    """
    order = np.argsort(-weights, kind="stable")[: max(1, int((weights > 0).sum()))]
    if not weights.any():
        order = generator.permutation(len(weights))
    return order[np.arange(n) % len(order)]


SELECTIONS: dict[str, Select] = {"sample": by_sampling, "rank": by_rank}
"""Name in ``evolution.selection`` → (weights (m,), n, generator) → indices (n,)."""


def threshold_votes(noisy: np.ndarray, threshold: float) -> np.ndarray:
    """``max(noisy - threshold, 0)``: most candidates got no vote, and noise alone should not make
    parents.
    """
    return np.maximum(noisy.astype(np.float64) - threshold, 0.0)


def next_parents(
    weights: np.ndarray,
    n_classes: int,
    *,
    config: EvolutionConfig,
    n_images: int,
    seed: int,
    iteration: int,
) -> np.ndarray:
    """The parent of every slot of the next generation, each of its slot's class.

    Args:
        weights: (m,) thresholded noisy votes of the present generation.
        n_images: Slots of the last generation.
        iteration: The one that released the votes, in [0, config.iterations). After the last, there
            are ``n_images`` slots, one child or survivor each; before, each parent selected takes
            ``variations + keep_selected`` slots.

    Returns:
        int64 (slots,), indices into the present generation.
    """
    last = iteration == config.iterations - 1
    slots = n_images if last else config.candidates * n_classes
    parents = np.empty(slots, np.int64)
    for label in range(n_classes):
        of_class = weights[label::n_classes]
        wanted = len(parents[label::n_classes]) if last else config.population
        generator = np.random.default_rng([image_seed(seed, -1 - iteration), label])
        chosen = SELECTIONS[config.selection](of_class, wanted, generator)
        copies = 1 if last else config.variations + config.keep_selected
        parents[label::n_classes] = np.tile(chosen, copies) * n_classes + label
    return parents


def kept_slots(parents: np.ndarray, config: EvolutionConfig) -> np.ndarray:
    """bool (slots,): where the parent itself stays. With ``keep_selected`` it is each parent's
    first slot.
    """
    kept = np.zeros(len(parents), bool)
    if config.keep_selected:
        kept[np.unique(parents, return_index=True)[1]] = True
    return kept


def slot_seeds(seed: int, generation: int, *, purpose: int, slots: np.ndarray) -> np.ndarray:
    """int64 seeds of slots' images. The first generation's are those of :func:`synthesize`'s
    images.

    Args:
        purpose: 0 for the slot's own image, 1 ... k for its lookahead variations.
    """
    root = seed
    if generation > 0 or purpose > 0:
        # negative indices: no image of a data set has them
        root = image_seed(image_seed(seed, -1_000_000 - generation), purpose)
    return np.array([image_seed(root, int(slot)) for slot in slots], np.int64)
