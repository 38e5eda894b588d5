"""What the rows of :mod:`sapf_ray.evaluation.set_scores` compute, from features extracted once.

Each takes the inputs and the feature space, and gives the numbers of its rows by name.
"""

from __future__ import annotations

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from sapf_ray.evaluation.features import FeatureSpace
from sapf_ray.evaluation.fidelity import (
    check_numbers,
    features_of,
    frechet_distance,
    reference_features,
)
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.protocols import protocol_of

DISTANCES = 2**25  # between features that are in memory together
NEIGHBOURS = 3  # of precision and recall, as torch-fidelity's default and DPImageBench
KID_SUBSET = 1000  # images of each of its 100 random subsets, or as many as there are


def fid_of(inputs: Inputs, space: FeatureSpace) -> dict[str, float]:
    """Frechet distance, of at most as many synthetic images as the protocol has."""
    ours, theirs = _both(inputs, space)
    most = protocol_of(inputs.config).most_of_fid
    if most and len(ours) > most:
        chosen = np.random.default_rng(inputs.seed).permutation(len(ours))[:most]
        ours = ours[torch.from_numpy(np.sort(chosen))]
    return {"fid": frechet_distance(ours, theirs)}


def kid_of(inputs: Inputs, space: FeatureSpace) -> dict[str, float]:
    """Mean squared maximum mean discrepancy over random subsets; about 0 for equal laws."""
    ours, theirs = _both(inputs, space)
    found = kid_features_to_metric(
        ours,
        theirs,
        kid_subset_size=min(KID_SUBSET, len(ours), len(theirs)),
        rng_seed=inputs.seed,
        verbose=False,
    )
    return {"kid": float(found[torch_fidelity.KEY_METRIC_KID_MEAN])}


def precision_recall_of(inputs: Inputs, space: FeatureSpace) -> dict[str, float]:
    """Shares in [0, 1]; {} where one side has no more images than neighbours are asked for."""
    ours, theirs = _both(inputs, space)
    larger = max(len(ours), len(theirs))
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        return {}
    found = prc_features_to_metric(
        ours.to(inputs.device),
        theirs.to(inputs.device),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=max(1, DISTANCES // larger),
        save_cpu_ram=True,
        verbose=False,
    )
    return {name: float(found[name]) for name in ("precision", "recall")}


def inception_score_of(inputs: Inputs, space: FeatureSpace) -> dict[str, float]:
    """From 1, where all images look alike to the network, to its number of classes."""
    _, logits = _ours(inputs, space)
    splits = max(1, min(10, len(logits) // 2))
    found = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=inputs.seed)
    return {"inception_score": float(found[torch_fidelity.KEY_METRIC_ISC_MEAN])}


def fid_per_class_of(inputs: Inputs, space: FeatureSpace) -> dict[str, float]:
    """Mean and largest of the classes' own distances; classes of fewer than two images on a side
    do not count. Few images a class bias it upwards.
    """
    ours, theirs = _both(inputs, space)
    synthetic, real = inputs.synthetic.labels, inputs.reference.labels
    found = []
    for label in range(len(inputs.class_names)):
        of_class = ours[torch.from_numpy(synthetic == label)]
        of_real = theirs[torch.from_numpy(real == label)]
        if min(len(of_class), len(of_real)) >= 2:
            found.append(frechet_distance(of_class, of_real))
    if not found:
        return {}
    return {"fid_per_class": float(np.mean(found)), "fid_worst_class": max(found)}


def _ours(inputs: Inputs, space: FeatureSpace) -> tuple[Tensor, Tensor]:
    """Features and logits of the synthetic images; no logits where no score needs them."""
    images = inputs.synthetic
    layers = [space.layer]
    if "inception_score" in inputs.config.scores:
        layers.append(space.logits)
    found = inputs.shared(
        f"synthetic features {space.layer}",
        lambda: features_of(
            images, layers, space=space, config=inputs.config, device=inputs.device
        ),
    )
    return found[space.layer], found.get(space.logits, torch.empty(0))


def _both(inputs: Inputs, space: FeatureSpace) -> tuple[Tensor, Tensor]:
    """Features of the synthetic and of the real images, at least two of each."""
    images, reference = inputs.synthetic, inputs.reference  # refused where not declared
    check_numbers(len(images), len(reference))
    theirs = inputs.shared(
        f"reference features {space.layer}",
        lambda: reference_features(
            reference, space=space, config=inputs.config, device=inputs.device
        ),
    )
    return _ours(inputs, space)[0], theirs
