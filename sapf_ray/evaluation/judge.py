"""Conditional fidelity: how many synthetic images show the class that they are labelled with.

A *judge*, a classifier trained on the real training images, looks at the synthetic ones; the share
of those that it gives their own label is the conditional fidelity. Accuracy alone misleads: labels
given by another classifier teach a student that classifier's knowledge, whatever the images show.
(Shmelkov, Schmid and Alahari, "How good is my GAN?", ECCV 2018, call the pair GAN-test and
GAN-train.)

The judge reads real training and test images outside the privacy mechanism: a non-private
measurement of research runs, like every score against real images.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sapf_ray.evaluation.classifiers import CLASSIFIERS
from sapf_ray.evaluation.downstream import accuracy_of, fit
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.pictures import Pictures
from sapf_ray.evaluation.protocols import quick_recipe
from sapf_ray.files import short_hash, write_atomic

LEAST_STEPS = 100  # of the judge's optimizer; small data sets take more epochs for it
LEAST_IMAGES = 5000  # that the judge may learn from, however few synthetic ones there are
FEWEST = 4  # training images below which there is no judge


def fidelity_and_judge(inputs: Inputs) -> tuple[float, float] | None:
    """Conditional fidelity, and the accuracy of the judge itself on real test images.

    The judge is trained as classifiers of the protocol ``quick`` are, for fewer epochs, on at most
    as many real images as there are synthetic ones (but up to 5,000), so it costs less than an
    accuracy.

    Args:
        inputs: Synthetic images, real training and test images.

    Returns:
        Two numbers in [0, 1]; None where there are too few training images for a judge.
    """
    judge = _judge(inputs)
    if judge is None:
        return None
    return (
        accuracy_of(judge, inputs.synthetic, device=inputs.device),
        accuracy_of(judge, inputs.test, device=inputs.device),
    )


def _judge(inputs: Inputs) -> nn.Module | None:
    """The judge, from ``evaluation.cache_dir`` where an earlier evaluation of the same images left
    it there; None where there is too little to learn from.
    """
    kept = _kept(inputs)
    build = CLASSIFIERS[inputs.config.judge]
    n_classes = len(inputs.class_names)
    if kept is not None and kept.exists():
        judge = build(n_classes, inputs.resolution).to(memory_format=torch.channels_last)
        judge.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
        return judge.to(inputs.device).eval()
    train = inputs.some_train(_n_images(inputs))
    if len(train) < FEWEST:
        return None
    judge = fit(
        quick_recipe(replace(inputs.config, epochs=_epochs(inputs, train)), build),
        train,
        n_classes=n_classes,
        seed=inputs.seed,
        device=inputs.device,
    )
    if kept is not None:
        content = io.BytesIO()
        torch.save(judge.state_dict(), content)
        write_atomic(kept, content.getvalue(), mode=0o600)
    return judge


def _n_images(inputs: Inputs) -> int:
    return min(inputs.source.n_train, max(LEAST_IMAGES, inputs.n_synthetic))


def _epochs(inputs: Inputs, train: Pictures) -> int:
    steps = max(1, len(train) // inputs.config.batch_size)
    return max(inputs.config.judge_epochs, -(-LEAST_STEPS // steps))


def _kept(inputs: Inputs) -> Path | None:
    """Where the judge is kept. It is as sensitive as the images, hence nowhere by default."""
    config = inputs.config
    if config.cache_dir is None:
        return None
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings = [config.judge, config.judge_epochs, config.batch_size, config.learning_rate]
    parts = [inputs.source.fingerprint(), inputs.resolution, inputs.seed, _n_images(inputs)]
    return folder / f"judge-{short_hash([*parts, *settings])}.pt"
