"""The scores of a synthetic data set against real images.

Everything here reads real images outside the privacy mechanism: a non-private measurement of
research runs. A release run leaves it out (``evaluation.enabled: false``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import DataError
from sapf_ray.evaluation.downstream import train_and_score
from sapf_ray.synthesis.writer import read_manifest, read_synthetic


def check_evaluation(config: EvaluationConfig) -> None:
    """Finds what would stop the evaluation, before a run spends hours or budget.

    Raises:
        DataError: Inception weights are wanted but cannot be used.
    """
    if config.enabled:
        from sapf_ray.evaluation.fidelity import fid_name

        fid_name(config)


def evaluate(
    synthetic_dir: Path | str,
    source: ImageSource,
    resolution: int,
    config: EvaluationConfig,
    seed: int,
    device: str = "cpu",
    cache_dir: Path | str | None = None,
    fidelity: bool = True,
    accuracy: bool = True,
) -> dict[str, float]:
    """Scores a finished synthetic data set: FID and accuracy on real test images.

    Args:
        synthetic_dir: Directory written by :func:`sapf_ray.synthesis.synthesize`.
        source: The real images.
        resolution: Side in pixels at which both are compared; synthetic images of another size are
            resized.
        config: Features, FID reference and classifiers.
        seed: Seeds the classifiers.
        device: Torch device string.
        cache_dir: See :func:`sapf_ray.evaluation.fidelity.frechet_distance`.
        fidelity: Compute the FID.
        accuracy: Train the classifiers.

    Returns:
        ``fid`` or ``fid_glyph``; ``accuracy`` and ``accuracy_<classifier>`` in [0, 1]; the counts
        ``n_synthetic``, ``n_reference`` and ``n_test``.

    Raises:
        DataError: The synthetic data set is unfinished, damaged or has other classes than the
            source.
    """
    names = read_manifest(synthetic_dir)["class_names"]
    if tuple(names) != source.class_names:
        ours, theirs = ", ".join(names), ", ".join(source.class_names)
        raise DataError(f"{synthetic_dir}: its classes are {ours}, those of the real data {theirs}")
    images, labels = read_synthetic(synthetic_dir)
    images = resize(images, resolution)
    test = source.read("test", np.arange(source.n_test), resolution)
    scores: dict[str, float] = {}
    if fidelity:
        from sapf_ray.evaluation.fidelity import (
            frechet_distance,  # seconds, which tasks that train a classifier are spared
        )

        reference = test[0]
        if config.fid_reference == "train":
            reference, _ = source.read("train", np.arange(source.n_train), resolution)
        scores |= frechet_distance(
            images, reference, config=config, device=device, cache_dir=cache_dir
        )
        scores["n_reference"] = len(reference)
    if accuracy:
        scores |= train_and_score(
            images,
            labels,
            test_images=test[0],
            test_labels=test[1],
            n_classes=len(names),
            config=config,
            seed=seed,
            device=device,
        )
    return {**scores, "n_synthetic": len(images), "n_test": len(test[0])}


def resize(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (n, h, w, 3) → uint8 (n, R, R, 3), bilinear; unchanged where the size is right already."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    size = (resolution, resolution)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BILINEAR)) for i in images]
    )
