"""Table of downstream classifiers: networks without weights; nothing is downloaded.

Importing this module does not import torch; building a network does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from torch import nn

SMALL_IMAGE = 64  # pixels; up to here the large classifiers keep full resolution in their stem

Build = Callable[[int, int], "nn.Module"]
"""From (number of classes, image side R in pixels) to a network from float (n, 3, R, R) in [-1, 1]
to logits (n, classes)."""


def _small_cnn(n_classes: int, side: int) -> nn.Module:
    """Four convolutions, about 0.4 M parameters; seconds on a CPU."""
    from torch import nn

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


def torchvision_model(name: str) -> Build:
    """Any ResNet-shaped model of torchvision, by its name there."""

    def build(n_classes: int, side: int) -> nn.Module:
        import torchvision
        from torch import nn

        model = torchvision.models.get_model(name, weights=None, num_classes=n_classes)
        if side <= SMALL_IMAGE:
            # the ImageNet stem would shrink a 32-pixel image to 8 pixels before the first block
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        return model

    return build


CLASSIFIERS: Registry[Build] = Registry(
    "evaluation.classifiers",
    {
        "cnn": _small_cnn,
        "resnet": torchvision_model("resnet18"),
        "wrn": torchvision_model("wide_resnet50_2"),
        "resnext": torchvision_model("resnext50_32x4d"),
    },
)
"""Name in ``evaluation.classifiers`` to builder."""
