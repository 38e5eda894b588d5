"""Downstream accuracy: train on synthetic images, test on real ones (protocol of DPImageBench, Gong
et al. 2025).

The epoch is chosen on held-out *synthetic* images, so the real test set plays no part in training.
With the same seed, device and number of threads the result is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError

HELD_OUT = 0.1  # share of the training images that chooses the epoch
SMALL_IMAGE = 64  # pixels; up to here the large classifiers keep full resolution in their stem

# Augmentation: any image class survives these, so they need no look at the data.
ROTATION = 10.0  # degrees
SCALE = 0.1  # relative
SHIFT = 0.08  # of the image side


def _small_cnn(n_classes: int, side: int) -> nn.Module:
    """Four convolutions, about 0.4 M parameters; seconds on a CPU."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 96),
        nn.MaxPool2d(2),
        *block(96, 128),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128 * 16, n_classes),
    )


def _torchvision(name: str) -> Callable[[int, int], nn.Module]:
    def build(n_classes: int, side: int) -> nn.Module:
        import torchvision  # seconds, which the small network is spared

        model = torchvision.models.get_model(name, weights=None, num_classes=n_classes)
        if side <= SMALL_IMAGE:
            # the ImageNet stem would shrink a 32-pixel image to 8 pixels before the first block
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        return model

    return build


CLASSIFIERS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": _small_cnn,
    "resnet": _torchvision("resnet18"),
    "wrn": _torchvision("wide_resnet50_2"),
    "resnext": _torchvision("resnext50_32x4d"),
}
"""Name → builder of (number of classes, image side in pixels). Nothing is downloaded."""


def train_and_score(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    *,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Accuracy on the test images of every classifier in ``config.classifiers``.

    Args:
        train_images: uint8 (n, R, R, 3), n ≥ 4; a tenth of them chooses the epoch.
        train_labels: int64 (n,) in [0, n_classes).
        test_images: uint8 (m, R, R, 3), m ≥ 1.
        test_labels: int64 (m,).
        n_classes: Number of classes.
        config: Classifiers, epochs, batch size, learning rate.
        seed: Seeds initial weights, batches, augmentation and the held-out choice.
        device: Torch device string.

    Returns:
        ``accuracy_<classifier>`` for each and their mean ``accuracy``, all in [0, 1].

    Raises:
        DataError: Too few images, or train and test images of different shape.
    """
    if len(train_images) < 4 or len(test_images) < 1:
        raise DataError(
            "downstream accuracy needs at least 4 training images and 1 test image, "
            f"got {len(train_images)} and {len(test_images)}"
        )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"training images are {train_images.shape[1:]}, test images {test_images.shape[1:]}; sizes must agree"
        )
    scores = {}
    x_test, y_test = _to_tensors(test_images, test_labels)
    for name in config.classifiers:
        model = fit(name, train_images, train_labels, n_classes, config, seed, device)
        scores[f"accuracy_{name}"], _ = _score(model, x_test, y_test, device)
    return {"accuracy": float(np.mean(list(scores.values()))), **scores}


def fit(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    config: EvaluationConfig,
    seed: int,
    device: str,
) -> nn.Module:
    """Trains one classifier and returns it, in evaluation mode, as of its best epoch on the
    held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        model = (
            CLASSIFIERS[name](n_classes, images.shape[1])
            .to(device)
            .to(memory_format=torch.channels_last)
        )
        x, y = _to_tensors(images, labels)
        order = torch.randperm(len(x), generator=generator)
        n_held_out = max(1, round(HELD_OUT * len(x)))
        held_out, training = order[:n_held_out], order[n_held_out:]

        batch_size = min(config.batch_size, len(training))
        steps = len(training) // batch_size
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=config.learning_rate, total_steps=config.epochs * steps
        )
        best, best_state = (-1.0, 0.0), model.state_dict()
        for _ in range(config.epochs):
            model.train()
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for batch in shuffled[: steps * batch_size].split(batch_size):
                inputs = augment(_normalize(x[batch]), generator).to(
                    device, memory_format=torch.channels_last
                )
                loss = F.cross_entropy(model(inputs), y[batch].to(device), label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            accuracy, held_out_loss = _score(model, x[held_out], y[held_out], device)
            if (accuracy, -held_out_loss) > best:
                best, best_state = (accuracy, -held_out_loss), copy.deepcopy(model.state_dict())
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
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(
        np.asarray(labels, dtype=np.int64)
    )


def _normalize(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]; by batch, since 60,000 images as floats would not fit everywhere."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def _score(model: nn.Module, x: Tensor, y: Tensor, device: str) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy."""
    model.eval()
    batches = (
        _normalize(batch).to(device, memory_format=torch.channels_last) for batch in x.split(256)
    )
    logits = torch.cat([model(batch).cpu() for batch in batches])
    return int((logits.argmax(1) == y).sum()) / len(y), float(F.cross_entropy(logits, y))
