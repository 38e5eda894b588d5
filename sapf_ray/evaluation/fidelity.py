"""Frechet distance (Heusel et al. 2017) through torch-fidelity, in one of two feature spaces.

``fid`` uses Inception-v3 pool features, comparable with published numbers, and needs
torch-fidelity's weights file. ``fid_glyph`` uses the small network that ships with the package
(trained on public rendered characters), works offline, and is comparable with nothing but itself.
"""

from __future__ import annotations

import hashlib
import pickle
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
from sapf_ray.models.glyph_features import FEATURE_DIM, load_glyph_features

GLYPH_EXTRACTOR = "sapf-glyph"
INCEPTION_EXTRACTOR = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
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


def fid_name(config: EvaluationConfig) -> str:
    """``fid`` or ``fid_glyph``: the metric this config leads to. Reads the weights, so call it
    before a long run.

    Raises:
        DataError: Inception weights are wanted but missing, truncated or of another network.
    """
    if config.fid_features == "glyph" or config.inception_weights is None:
        return "fid_glyph"
    check_inception_weights(config.inception_weights)
    return "fid"


def check_inception_weights(path: str) -> None:
    """Raises a one-line :class:`DataError` unless ``path`` holds torch-fidelity's Inception-v3
    weights.
    """
    expected = f"expected torch-fidelity's {INCEPTION_WEIGHTS} (about 91 MB)"
    where = f"evaluation.inception_weights = {path!r}"
    if not Path(path).is_file():
        raise DataError(f"{where}: no such file; {expected}")
    try:
        # weights_only: torch-fidelity itself would unpickle anything
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{where}: truncated, or not a PyTorch weights file; {expected}") from error
    if not isinstance(state, dict) or "Mixed_7c.branch1x1.conv.weight" not in state:
        raise DataError(f"{where}: weights of another network; {expected}")


def frechet_distance(
    images: np.ndarray,
    reference: np.ndarray,
    *,
    config: EvaluationConfig,
    device: str = "cpu",
    cache_dir: Path | str | None = None,
) -> dict[str, float]:
    """Distance between two sets of images.

    Args:
        images: uint8 (n, h, w, 3), n ≥ 2.
        reference: uint8 (m, h', w', 3), m ≥ 2; the real images.
        config: Chooses the features.
        device: Torch device string.
        cache_dir: Where features of ``reference`` are kept, by content, for the next call with the
            same images (Inception only: the glyph network is cheap). They are as sensitive as the
            images: the directory is made mode 0700. Nothing is cached without it, and nothing is
                ever written elsewhere.

    Returns:
        ``{"fid": value}`` or ``{"fid_glyph": value}``. Small sets bias it upwards: compare equal
        sizes only.

    Raises:
        DataError: Fewer than two images, or Inception weights that cannot be used.
    """
    if min(len(images), len(reference)) < 2:
        raise DataError(
            f"FID needs at least 2 images on each side, got {len(images)} and {len(reference)}"
        )
    name = fid_name(config)
    options: dict[str, Any] = {"feature_extractor": GLYPH_EXTRACTOR, "cache": False}
    if name == "fid":
        options = {
            "feature_extractor": INCEPTION_EXTRACTOR,
            "feature_extractor_weights_path": config.inception_weights,
            "cache": cache_dir is not None,
        }
        if cache_dir is not None:
            Path(cache_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
            options |= {
                "cache_root": str(cache_dir),
                "input2_cache_name": _cache_name(reference, config),
            }
    metrics = torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        fid=True,
        cuda=device.startswith("cuda"),
        batch_size=BATCH_SIZE,
        save_cpu_ram=True,  # no loader processes: the images are in memory already
        verbose=False,
        **options,
    )
    # identical sets come out a rounding error below zero
    return {name: max(0.0, float(metrics[torch_fidelity.KEY_METRIC_FID]))}


def _cache_name(images: np.ndarray, config: EvaluationConfig) -> str:
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(Path(str(config.inception_weights)).read_bytes())
    return f"reference-{digest.hexdigest()[:32]}"
