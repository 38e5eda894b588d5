"""Distances between two sets of images through torch-fidelity, in a feature space of
:mod:`sapf_ray.evaluation.features`.

:func:`frechet` is the Frechet distance (Heusel et al. 2017); :func:`compare` gives whatever
torch-fidelity computes, by its keywords.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.evaluation.features import (
    FEATURES,
    GLYPH_EXTRACTOR,
    FeatureSpace,
    feature_space_name,
)
from sapf_ray.models.glyph_features import FEATURE_DIM, load_glyph_features

BATCH_SIZE = 64


class GlyphExtractor(FeatureExtractorBase):
    """The shipped glyph network in the form torch-fidelity asks for."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.net = load_glyph_features()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (str(FEATURE_DIM),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return str(FEATURE_DIM)

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """uint8 (n, 3, h, w) of any size → float64 (n, d)."""
        return (self.net.features(input.float() / 255).double(),)


torch_fidelity.register_feature_extractor(GLYPH_EXTRACTOR, GlyphExtractor)


class _Images(Dataset):
    """uint8 (n, h, w, 3) as torch-fidelity reads it: uint8 tensors (3, h, w)."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1)


def compare(
    images: np.ndarray,
    reference: np.ndarray,
    *,
    config: EvaluationConfig,
    device: str = "cpu",
    space: FeatureSpace | None = None,
    **requested: Any,
) -> dict[str, float]:
    """Any of torch-fidelity's numbers for two sets of images.

    Args:
        images: uint8 (n, h, w, 3), n ≥ 2.
        reference: uint8 (m, h', w', 3), m ≥ 2; the real images.
        config: Settings; where ``cache_dir`` is given and the network is slow, features of
            ``reference`` are kept there, by content, for the next call with the same images. They
            are as sensitive as the images: the directory is made mode 0700. Nothing is ever written
            elsewhere.
        device: Torch device string.
        space: The feature space; by default the one that ``config`` names.
        **requested: Keyword arguments of ``torch_fidelity.calculate_metrics``, e.g. ``kid=True,
            kid_subset_size=100``.

    Returns:
        torch-fidelity's result under its own names, e.g. ``kernel_inception_distance_mean``.

    Raises:
        DataError: Fewer than two images on one side.
    """
    if min(len(images), len(reference)) < 2:
        raise DataError(
            "comparing sets of images needs at least 2 images on each side, "
            f"got {len(images)} and {len(reference)}"
        )
    space = space or FEATURES[feature_space_name(config)]
    return torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        cuda=device.startswith("cuda"),
        batch_size=BATCH_SIZE,
        save_cpu_ram=True,  # no loader processes: the images are in memory already
        verbose=False,
        **space.options(config),
        **_cache_options(reference, config, space=space),
        **requested,
    )


def frechet(
    images: np.ndarray,
    reference: np.ndarray,
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
    found = compare(images, reference, config=config, device=device, space=space, fid=True)
    # identical sets come out a rounding error below zero
    return max(0.0, float(found[torch_fidelity.KEY_METRIC_FID]))


def _cache_options(
    reference: np.ndarray, config: EvaluationConfig, *, space: FeatureSpace
) -> dict[str, Any]:
    if config.cache_dir is None or not space.cacheable:
        return {"cache": False}
    Path(config.cache_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "cache": True,
        "cache_root": str(config.cache_dir),
        "input2_cache_name": _cache_name(reference, config),
    }


def _cache_name(images: np.ndarray, config: EvaluationConfig) -> str:
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    if config.inception_weights is not None:
        digest.update(Path(config.inception_weights).read_bytes())
    return f"reference-{digest.hexdigest()[:32]}"
