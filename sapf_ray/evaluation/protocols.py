"""Table of evaluation protocols: which classifiers, how they learn, what FID compares.

``quick`` learns in minutes and follows the settings. ``dpimagebench`` is the evaluation of
DPImageBench (Gong et al. 2025; github.com/2019ChenGong/DPImageBench at 565f8d7,
``evaluation/evaluator.py``) with what the authors of DP-SAPF changed in it
(github.com/2019ChenGong/DP-SAPF at e721d60): the setting of the paper's tables.
``docs/evaluation.md`` has every choice with its line in the source. Importing this module loads no
network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.classifiers import CLASSIFIERS, Build
from sapf_ray.models.inception import INCEPTION_EXTRACTOR
from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from torch import nn

HELD_OUT = 0.1  # share of the training images that chooses the epoch
PYTORCH_FID_EXTRACTOR = "sapf-inception-pytorch-fid"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is known of the images to classify; all of it public.

    Attributes:
        data: Name of the data set.
        side: Of the images, in pixels.
    """

    data: str
    side: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one classifier learns.

    Attributes:
        build: Makes the network.
        epochs: At least 1.
        batch_size: Images per optimizer step.
        learning_rate: Largest step size.
        optimizer: AdamW, SGD with momentum 0.9 or Adam.
        weight_decay: Of the optimizer.
        step_epochs: Epochs after which the step size falls to ``step_factor`` of what it was; 0 is
            a cycle up and down over all steps (one-cycle), which leaves out a last batch that is
            not full.
        step_factor: Factor in (0, 1).
        label_smoothing: In [0, 1).
        augmented: Whether images are rotated, scaled and shifted a little.
        average: Decay of the moving average of weights that is tested; 0 tests the weights
            themselves.
        held_out: Share of the training images that chooses the epoch; of equal accuracies the
            smaller loss, or with an average the later epoch.
        parts: Parts of a batch whose gradients are added up, for memory; batch normalisation sees
            one of them.
    """

    build: Build
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd", "adam"] = "adamw"
    weight_decay: float = 0.0
    step_epochs: int = 0
    step_factor: float = 0.2
    label_smoothing: float = 0.0
    augmented: bool = False
    average: float = 0.0
    held_out: float = HELD_OUT
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One row.

    Attributes:
        title: In prose.
        recipe: From the settings, a classifier's name and the task to how it learns.
        has_networks: Whether the classifiers are the protocol's own, and not rows of
            :data:`sapf_ray.evaluation.classifiers.CLASSIFIERS`.
        smoothing: Filter with which images are reduced, antialiased.
        most_of_fid: Most synthetic images that FID sees; 0: all.
        equal_reference: Whether FID sees no more real images than there are synthetic ones.
        inception: Name of the extractor, which says how images are brought to 299 pixels.
    """

    title: str
    recipe: Callable[[EvaluationConfig, str, Task], Recipe]
    has_networks: bool = False
    smoothing: Literal["bilinear", "lanczos"] = "bilinear"
    most_of_fid: int = 0
    equal_reference: bool = False
    inception: str = INCEPTION_EXTRACTOR


def quick_recipe(config: EvaluationConfig, build: Build) -> Recipe:
    """Every network alike, as the settings say."""
    return Recipe(
        build=build,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=0.01,
        label_smoothing=0.05,
        augmented=True,
    )


def _quick(config: EvaluationConfig, name: str, task: Task) -> Recipe:
    return quick_recipe(config, CLASSIFIERS[name])


def _wide_resnet(**shape: float) -> Build:
    def build(n_classes: int, side: int) -> nn.Module:
        from sapf_ray.evaluation.benchmark_networks import wide_resnet  # torch

        return wide_resnet(n_classes, **shape)  # type: ignore[arg-type]

    return build


def _resnet(depth: int) -> Build:
    def build(n_classes: int, side: int) -> nn.Module:
        from sapf_ray.evaluation.benchmark_networks import resnet  # torch

        return resnet(n_classes, depth=depth)

    return build


def _resnext(**shape: int) -> Build:
    def build(n_classes: int, side: int) -> nn.Module:
        from sapf_ray.evaluation.benchmark_networks import resnext  # torch

        return resnext(n_classes, **shape)

    return build


_OF_CIFAR = {
    "resnet": _resnet(164),
    "wrn": _wide_resnet(depth=28, widening=10, dropout=0.3),
    "resnext": _resnext(depth=28, groups=8, widening=10),
}
_OF_OTHERS = {
    "resnet": _resnet(110),
    "wrn": _wide_resnet(depth=40, widening=4, dropout=0.3),
    "resnext": _resnext(depth=29, groups=8, widening=4),
}


def _network(networks: Mapping[str, Build], name: str) -> Build:
    if name not in networks:
        allowed = f"must be of {', '.join(networks)} where evaluation.protocol is dpimagebench"
        raise ConfigError("evaluation.classifiers", name, allowed)
    return networks[name]


def benchmark_recipe(config: EvaluationConfig, name: str, task: Task) -> Recipe:
    """CIFAR's networks and schedule for its sets, smaller ones and Adam for all others."""
    if task.data.startswith("cifar"):
        return Recipe(
            build=_network(_OF_CIFAR, name),
            epochs=200,
            batch_size=128,
            learning_rate=0.1,
            optimizer="sgd",
            weight_decay=5e-4,
            step_epochs=60,
            average=0.9999,
            held_out=1 / 12,
        )
    return Recipe(
        build=_network(_OF_OTHERS, name),
        epochs=50,
        batch_size=256,
        learning_rate=0.01,
        optimizer="adam",
        step_epochs=20,
        average=0.9999,
        held_out=1 / 12,
        parts=2 if task.side >= 256 else 1,
    )


PROTOCOLS: Registry[Protocol] = Registry(
    "evaluation.protocol",
    {
        "quick": Protocol(title="minutes, as the settings say", recipe=_quick),
        "dpimagebench": Protocol(
            title="DPImageBench's evaluator as the paper's authors ran it",
            recipe=benchmark_recipe,
            has_networks=True,
            smoothing="lanczos",
            most_of_fid=50_000,
            equal_reference=True,
            inception=PYTORCH_FID_EXTRACTOR,
        ),
    },
)
"""Value of ``evaluation.protocol`` to protocol."""


def protocol_of(config: EvaluationConfig) -> Protocol:
    """The protocol of these settings."""
    return PROTOCOLS[config.protocol]


def epochs_in_all(config: EvaluationConfig, task: Task) -> int:
    """Epochs of all classifiers together, for estimates of time."""
    recipe = protocol_of(config).recipe
    return sum(recipe(config, name, task).epochs for name in config.classifiers)
