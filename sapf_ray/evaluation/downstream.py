"""Downstream accuracy: train on synthetic images, test on real ones (protocol of DPImageBench, Gong
et al. 2025).

The epoch is chosen on held-out *synthetic* images, so the real test set plays no part in training.
With the same seed, device and number of threads the result is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.evaluation.learner import Learner
from sapf_ray.evaluation.pictures import Pictures, ahead
from sapf_ray.evaluation.protocols import Recipe, Task, protocol_of

# Augmentation: any image class survives these, so they need no look at the data.
ROTATION = 10.0  # degrees
SCALE = 0.1  # relative
SHIFT = 0.08  # of the image side
SCORED = 256  # images that a trained network sees together, at most
SCORED_PIXELS = SCORED * 128**2  # and pixels: its first activations are 128 bytes each


def accuracy_on_test(
    recipe: Recipe,
    train: Pictures,
    test: Pictures,
    *,
    n_classes: int,
    seed: int,
    device: str = "cpu",
) -> float:
    """Accuracy of one classifier, trained on the first set, on the second.

    Args:
        recipe: The network and how it learns.
        train: At least 4 images, of which some choose the epoch; labels in [0, n_classes).
        test: At least 1 image.
        n_classes: Number of classes.
        seed: Seeds initial weights, batches, augmentation and the held-out choice.
        device: Torch device string.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: Too few images, or train and test images of different shape.
    """
    if len(train) < 4 or len(test) < 1:
        raise DataError(
            "downstream accuracy needs at least 4 training images and 1 test image, "
            f"got {len(train)} and {len(test)}"
        )
    if train.side != test.side:
        raise DataError(
            f"training images have {train.side} pixels a side, test images {test.side}; "
            "sizes must agree"
        )
    model = fit(recipe, train, n_classes=n_classes, seed=seed, device=device)
    return accuracy_of(model, test, device=device)


def accuracy_of(model: nn.Module, images: Pictures, *, device: str = "cpu") -> float:
    """Share of the images that a trained network gives their own label, in [0, 1].

    Args:
        model: As :func:`fit` returns it, on ``device``.
        images: At least 1.
        device: Torch device string.
    """
    accuracy, _ = _score(model, images, np.arange(len(images)), device=device)
    return accuracy


def mean_accuracy(
    train: Pictures,
    test: Pictures,
    *,
    data: str,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str = "cpu",
) -> float:
    """Mean of :func:`accuracy_on_test` over the classifiers that the settings name.

    Args:
        train: As :func:`accuracy_on_test`, like the rest.
        test: Images that the accuracy is measured on.
        data: Name of the data set, which a protocol may go by.
        n_classes: Number of classes.
        config: Protocol and classifiers.
        seed: Seeds every classifier alike.
        device: Torch device string.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: As :func:`accuracy_on_test`.
    """
    task = Task(data=data, side=train.side)
    accuracies = []
    for name in config.classifiers:
        recipe = protocol_of(config).recipe(config, name, task)
        accuracies.append(
            accuracy_on_test(recipe, train, test, n_classes=n_classes, seed=seed, device=device)
        )
    return float(np.mean(accuracies))


def fit(recipe: Recipe, train: Pictures, *, n_classes: int, seed: int, device: str) -> nn.Module:
    """Trains one classifier.

    Args:
        recipe: The network and how it learns.
        train: Images and labels.
        n_classes: Number of classes.
        seed: Seeds initial weights, batches, augmentation and the held-out choice.
        device: Torch device string.

    Returns:
        The network in evaluation mode, as of its best epoch on the held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        model = recipe.build(n_classes, train.side)
        model = model.to(device).to(memory_format=torch.channels_last)
        order = torch.randperm(len(train), generator=generator)
        n_held_out = max(1, round(recipe.held_out * len(train)))
        held_out = order[:n_held_out].numpy()
        training = order[n_held_out:]

        learner = Learner(recipe, model, n_images=len(training))
        best = (-1.0, 0.0)
        best_state = model.state_dict()
        for epoch in range(recipe.epochs):
            model.train()
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for pixels, labels in ahead(_batches(train, learner.batches(shuffled))):
                inputs = _normalize(pixels)
                if recipe.augmented:
                    inputs = augment(inputs, generator)
                inputs = inputs.to(device, memory_format=torch.channels_last)
                learner.learn(inputs, labels.to(device))
            learner.end_epoch()
            accuracy, held_out_loss = _score(learner.tested, train, held_out, device=device)
            found = (accuracy, float(epoch) if recipe.average else -held_out_loss)
            if found > best:
                best = found
                best_state = copy.deepcopy(learner.tested.state_dict())
    model.load_state_dict(best_state)
    return model.eval()


def scored_together(side: int) -> int:
    """Images of this side in pixels that a trained network sees together.

    >>> scored_together(32), scored_together(512)
    (256, 16)
    """
    return max(1, min(SCORED, SCORED_PIXELS // side**2))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, scales and shifts each image at random; float (n, 3, R, R) in and out."""
    n = len(images)
    uniform = torch.rand(4, n, generator=generator) * 2 - 1
    angle = uniform[0] * ROTATION * torch.pi / 180
    scale = 1 + uniform[1] * SCALE
    shift = uniform[2:] * 2 * SHIFT  # affine_grid counts from -1 to 1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _batches(
    images: Pictures, chosen: Iterable[Tensor | np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 (k, 3, R, R), in channels-last memory, and labels int64 (k,)."""
    for rows in map(np.asarray, chosen):
        pixels = torch.from_numpy(images.read(rows)).permute(0, 3, 1, 2)
        yield pixels, torch.from_numpy(np.asarray(images.labels[rows], dtype=np.int64))


def _normalize(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]; by batch, since 60,000 such images would not fit everywhere."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def predicted(model: nn.Module, images: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """The class that a trained network gives each image.

    Args:
        model: As :func:`fit` returns it, on ``device``.
        images: uint8 (n, R, R, 3).
        device: Torch device string.

    Returns:
        int64 (n,).
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    inputs = _normalize(pixels).to(device, memory_format=torch.channels_last)
    return model(inputs).argmax(1).cpu().numpy()


@torch.no_grad()
def _score(
    model: nn.Module, images: Pictures, rows: np.ndarray, *, device: str
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy of the images at some positions."""
    model.eval()
    logits = []
    together = scored_together(images.side)
    parts = np.split(rows, range(together, len(rows), together))
    for pixels, _ in ahead(_batches(images, parts)):
        inputs = _normalize(pixels).to(device, memory_format=torch.channels_last)
        logits.append(model(inputs).cpu())
    found = torch.cat(logits)
    labels = torch.from_numpy(np.asarray(images.labels[rows], dtype=np.int64))
    correct = int((found.argmax(1) == labels).sum())
    return correct / len(rows), float(F.cross_entropy(found, labels))
