"""Distances between two sets of images through torch-fidelity, in a feature space of
:mod:`sapf_ray.evaluation.features`.

:func:`frechet` is the Frechet distance (Heusel et al. 2017); :func:`compare` gives whatever
torch-fidelity computes, by its keywords.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.evaluation.features import (
    FEATURES,
    FeatureSpace,
    feature_space_name,
)
from sapf_ray.evaluation.pictures import BATCH, Pictures, ahead
from sapf_ray.files import write_array

ROWS = 10_000  # of features that become float64 at a time


class _Images(Dataset):
    """Pictures as torch-fidelity reads them: uint8 tensors (3, h, w), one at a time."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        image = self.pictures.read(np.array([index]))[0]
        return torch.from_numpy(image).permute(2, 0, 1)


def compare(
    images: Pictures,
    reference: Pictures,
    *,
    config: EvaluationConfig,
    device: str = "cpu",
    space: FeatureSpace | None = None,
    **requested: Any,
) -> dict[str, float]:
    """Any of torch-fidelity's numbers for two sets of images.

    Args:
        images: At least 2.
        reference: At least 2, of any size; the real images.
        config: Settings of the evaluation.
        device: Torch device string.
        space: The feature space; by default the one that ``config`` names.
        **requested: Keyword arguments of ``torch_fidelity.calculate_metrics``, e.g. ``kid=True,
            kid_subset_size=100``.

    Returns:
        torch-fidelity's result under its own names, e.g. ``kernel_inception_distance_mean``.

    Raises:
        DataError: Fewer than two images on one side.
    """
    check_numbers(len(images), len(reference))
    space = space or FEATURES[feature_space_name(config)]
    return torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        cuda=device.startswith("cuda"),
        batch_size=BATCH,
        save_cpu_ram=True,  # no loader processes
        cache=False,
        verbose=False,
        **space.options(config),
        **requested,
    )


def features_of(
    images: Pictures,
    layers: Sequence[str],
    *,
    space: FeatureSpace,
    config: EvaluationConfig,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """What a network says of each image; of the images one batch is in memory.

    Args:
        images: At least 1.
        layers: Names of layers, as torch-fidelity calls them.
        space: The network.
        config: Settings of the evaluation.
        device: Torch device string.

    Returns:
        Layer to float (n, d), on the CPU.
    """
    options = dict(space.options(config))
    extractor = create_feature_extractor(
        options.pop("feature_extractor"),
        list(layers),
        cuda=device.startswith("cuda"),
        verbose=False,
        **options,
    )
    found: dict[str, Tensor] = {}
    start = 0
    with torch.no_grad():
        for batch in ahead(images.batches()):
            pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in batch])
            seen = extractor.convert_features_tuple_to_dict(extractor(pixels.to(device)))
            for layer, values in seen.items():
                if layer not in found:
                    found[layer] = torch.empty((len(images), values.shape[1]), dtype=values.dtype)
                found[layer][start : start + len(batch)] = values.cpu()
            start += len(batch)
    return found


def reference_features(
    reference: Pictures,
    *,
    space: FeatureSpace,
    config: EvaluationConfig,
    device: str = "cpu",
) -> Tensor:
    """Features of the real images that distances are measured in.

    Args:
        reference: The real images.
        space: The network.
        config: Settings; where ``cache_dir`` is given and the network is slow, features are kept
            there, by the images' content, for the next call with the same images. They are as
            sensitive as the images: the directory is made mode 0700. Nothing is ever written
            elsewhere.
        device: Torch device string.

    Returns:
        Float (m, d).
    """
    layer = space.layer
    kept = _kept(reference, space=space, config=config)
    if kept is not None and kept.exists():
        return torch.from_numpy(np.load(kept))
    found = features_of(reference, [layer], space=space, config=config, device=device)[layer]
    if kept is not None:
        write_array(kept, found.numpy(), mode=0o600)
    return found


def _kept(reference: Pictures, *, space: FeatureSpace, config: EvaluationConfig) -> Path | None:
    if config.cache_dir is None or not space.cacheable:
        return None
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest = hashlib.sha256(f"{space.options(config)} {space.layer} {reference.side}".encode())
    for batch in reference.batches():
        digest.update(np.ascontiguousarray(batch).data)
    if config.inception_weights is not None:
        digest.update(Path(config.inception_weights).read_bytes())
    return folder / f"reference-{digest.hexdigest()[:32]}.npy"


def frechet(
    images: Pictures,
    reference: Pictures,
    *,
    config: EvaluationConfig,
    device: str = "cpu",
    space: FeatureSpace | None = None,
) -> float:
    """Frechet distance between two sets of images.

    Small sets bias it upwards: compare equal sizes only.

    Args:
        images: As :func:`compare`, like the rest.
        reference: The real images.
        config: Settings of the evaluation.
        device: Torch device string.
        space: The feature space; by default the one that ``config`` names.

    Returns:
        A number of at least 0.

    Raises:
        DataError: Fewer than two images on one side.
    """
    check_numbers(len(images), len(reference))
    space = space or FEATURES[feature_space_name(config)]
    theirs = reference_features(reference, space=space, config=config, device=device)
    ours = features_of(images, [space.layer], space=space, config=config, device=device)
    return frechet_distance(ours[space.layer], theirs)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The same between features float (n, d) and (m, d), n and m ≥ 2."""
    found = fid_statistics_to_metric(_statistics(first), _statistics(second), verbose=False)
    # identical sets come out a rounding error below zero
    return max(0.0, float(found[torch_fidelity.KEY_METRIC_FID]))


def _statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean (d,) and covariance (d, d), for which few rows at a time become float64."""
    if len(features) <= ROWS:
        return fid_features_to_statistics(features)
    mean = features.mean(0, dtype=torch.float64)
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        total += centred.T @ centred
    covariance = total / (len(features) - 1)
    return {"mu": mean.to(features.dtype).numpy(), "sigma": covariance.numpy()}


def check_numbers(n: int, m: int) -> None:
    """Refuses sets that have no covariance.

    Raises:
        DataError: Fewer than two images on one side.
    """
    if min(n, m) < 2:
        raise DataError(
            f"comparing sets of images needs at least 2 images on each side, got {n} and {m}"
        )
