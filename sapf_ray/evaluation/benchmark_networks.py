"""The classifiers of DPImageBench, written from their papers in the forms that its evaluation uses.

Wide residual networks (Zagoruyko and Komodakis 2016), residual networks for CIFAR (He et al. 2016,
section 4.2) and ResNeXt for CIFAR (Xie et al. 2017). Each keeps the image's resolution in its stem,
halves it twice and averages what is left. ``docs/evaluation.md`` names the lines of the benchmark's
source that depths and widths are from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MakeBlock = Callable[[int, int, int], nn.Module]
"""From (channels in, channels out, stride) to a block."""


class WideBlock(nn.Module):
    """Normalisation and activation before each convolution; dropout between the two."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.project = None if inputs == outputs else _conv1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        inner = F.relu(self.norm2(self.conv1(active)))
        inner = self.conv2(self.dropout(inner))
        return inner + (x if self.project is None else self.project(active))


class BasicBlock(nn.Module):
    """Two convolutions, normalised after each; a strided projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class GroupedBlock(nn.Module):
    """A bottleneck whose middle convolution falls into groups."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, groups: int, widening: int
    ) -> None:
        super().__init__()
        width = groups * outputs // widening
        self.reduce, self.norm1 = _conv1(inputs, width), nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.expand, self.norm3 = _conv1(width, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.reduce(x)))
        inner = F.relu(self.norm2(self.conv(inner)))
        return F.relu(self.norm3(self.expand(inner)) + self.shortcut(x))


class Pooled(nn.Module):
    """The mean over all places: float (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def wide_resnet(n_classes: int, *, depth: int, widening: int, dropout: float) -> nn.Module:
    """WRN-depth-widening; depth is 6k + 4."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return WideBlock(inputs, outputs, stride, dropout=dropout)

    widths = [16, 16 * widening, 32 * widening, 64 * widening]
    network = nn.Sequential(
        _conv3(3, 16),
        *_stages(block, widths, blocks=(depth - 4) // 6),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        Pooled(),
        nn.Linear(widths[-1], n_classes),
    )
    return _initialised(network)


def resnet(n_classes: int, *, depth: int) -> nn.Module:
    """ResNet-depth of basic blocks; depth is 6k + 2."""
    network = nn.Sequential(
        *_stem(16),
        *_stages(BasicBlock, [16, 16, 32, 64], blocks=(depth - 2) // 6),
        Pooled(),
        nn.Linear(64, n_classes),
    )
    return _initialised(network)


def resnext(n_classes: int, *, depth: int, groups: int, widening: int) -> nn.Module:
    """ResNeXt-depth, groups x 64 channels times the widening; depth is 9k + 2, rounded down."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return GroupedBlock(inputs, outputs, stride, groups=groups, widening=widening)

    widths = [64, 64 * widening, 128 * widening, 256 * widening]
    network = nn.Sequential(
        *_stem(64),
        *_stages(block, widths, blocks=(depth - 2) // 9),
        Pooled(),
        nn.Linear(widths[-1], n_classes),
    )
    return _initialised(network)


def _stem(width: int) -> list[nn.Module]:
    return [_conv3(3, width), nn.BatchNorm2d(width), nn.ReLU()]


def _stages(block: MakeBlock, widths: list[int], *, blocks: int) -> list[nn.Module]:
    """Three stages of blocks, of which the second and third halve the resolution."""
    found = []
    for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
        found.append(block(inputs, outputs, stride))
        found += [block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return found


def _conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _conv1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def _initialised(network: nn.Module) -> nn.Module:
    """He initialisation by the fan out; a linear layer's bias is zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            torch.nn.init.zeros_(layer.bias)
    return network
