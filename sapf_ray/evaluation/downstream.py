"""Downstream accuracy: train on synthetic images, test on real ones (protocol of DPImageBench, Gong
et al. 2025).

The epoch is chosen on held-out *synthetic* images, so the real test set plays no part in training.
With the same seed, device and number of threads the result is the same.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.evaluation.classifiers import CLASSIFIERS, Build

HELD_OUT = 0.1  # share of the training images that chooses the epoch
# Augmentation: any image class survives these, so they need no look at the data.
ROTATION = 10.0  # degrees
SCALE = 0.1  # relative
SHIFT = 0.08  # of the image side


Labelled = tuple[np.ndarray, np.ndarray]


def accuracy_on_test(
    build: Build,
    train: Labelled,
    test: Labelled,
    *,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str = "cpu",
) -> float:
    """Accuracy of one classifier, trained on the first set, on the second.

    Args:
        build: Makes the network; a row of :data:`sapf_ray.evaluation.classifiers.CLASSIFIERS`.
        train: Images uint8 (n, R, R, 3), n ≥ 4, of which a tenth chooses the epoch, and labels
            int64 (n,) in [0, n_classes).
        test: Images uint8 (m, R, R, 3), m ≥ 1, and labels int64 (m,).
        n_classes: Number of classes.
        config: Epochs, batch size, learning rate.
        seed: Seeds initial weights, batches, augmentation and the held-out choice.
        device: Torch device string.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: Too few images, or train and test images of different shape.
    """
    n_train, n_test = len(train[0]), len(test[0])
    if n_train < 4 or n_test < 1:
        raise DataError(
            "downstream accuracy needs at least 4 training images and 1 test image, "
            f"got {n_train} and {n_test}"
        )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}; "
            "sizes must agree"
        )
    model = fit(build, train, n_classes=n_classes, config=config, seed=seed, device=device)
    return accuracy_of(model, test, device=device)


def accuracy_of(model: nn.Module, images: Labelled, *, device: str = "cpu") -> float:
    """Share of the images that a trained network gives their own label, in [0, 1].

    Args:
        model: As :func:`fit` returns it, on ``device``.
        images: Images uint8 (m, R, R, 3), m ≥ 1, and labels int64 (m,).
        device: Torch device string.
    """
    accuracy, _ = _score(model, *_to_tensors(*images), device=device)
    return accuracy


def mean_accuracy(
    train: Labelled,
    test: Labelled,
    *,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str = "cpu",
) -> float:
    """Mean of :func:`accuracy_on_test` over the classifiers that the settings name.

    Args:
        train: As :func:`accuracy_on_test`, like the rest.
        test: Images and labels that the accuracy is measured on.
        n_classes: Number of classes.
        config: Classifiers, epochs, batch size, learning rate.
        seed: Seeds every classifier alike.
        device: Torch device string.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: As :func:`accuracy_on_test`.
    """
    accuracies = [
        accuracy_on_test(
            CLASSIFIERS[name],
            train,
            test,
            n_classes=n_classes,
            config=config,
            seed=seed,
            device=device,
        )
        for name in config.classifiers
    ]
    return float(np.mean(accuracies))


def fit(
    build: Build,
    train: Labelled,
    *,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str,
) -> nn.Module:
    """Trains one classifier.

    Args:
        build: As :func:`accuracy_on_test`, like the rest.
        train: Images and labels.
        n_classes: Number of classes.
        config: Epochs, batch size, learning rate.
        seed: Seeds initial weights, batches, augmentation and the held-out choice.
        device: Torch device string.

    Returns:
        The network in evaluation mode, as of its best epoch on the held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        model = build(n_classes, train[0].shape[1])
        model = model.to(device).to(memory_format=torch.channels_last)
        x, y = _to_tensors(*train)
        order = torch.randperm(len(x), generator=generator)
        n_held_out = max(1, round(HELD_OUT * len(x)))
        held_out = order[:n_held_out]
        training = order[n_held_out:]

        batch_size = min(config.batch_size, len(training))
        steps = len(training) // batch_size
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=config.learning_rate, total_steps=config.epochs * steps
        )
        best = (-1.0, 0.0)
        best_state = model.state_dict()
        for _ in range(config.epochs):
            model.train()
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for batch in shuffled[: steps * batch_size].split(batch_size):
                inputs = augment(_normalize(x[batch]), generator)
                inputs = inputs.to(device, memory_format=torch.channels_last)
                loss = F.cross_entropy(model(inputs), y[batch].to(device), label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            accuracy, held_out_loss = _score(model, x[held_out], y[held_out], device=device)
            if (accuracy, -held_out_loss) > best:
                best = (accuracy, -held_out_loss)
                best_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return model.eval()


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


def _to_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, R, R), a view in channels-last memory, and int64 (n,)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return x, y


def _normalize(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]; by batch, since 60,000 such images would not fit everywhere."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def _score(model: nn.Module, x: Tensor, y: Tensor, *, device: str) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy."""
    model.eval()
    logits = []
    for batch in x.split(256):
        inputs = _normalize(batch).to(device, memory_format=torch.channels_last)
        logits.append(model(inputs).cpu())
    found = torch.cat(logits)
    correct = int((found.argmax(1) == y).sum())
    return correct / len(y), float(F.cross_entropy(found, y))
