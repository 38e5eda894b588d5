"""One classifier's optimizer, schedule and moving average, as a recipe has them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapf_ray.evaluation.protocols import Recipe


class Learner:
    """Takes a network through its training.

    Args:
        recipe: How it learns.
        model: The network, on its device; changed in place.
        n_images: Number of training images.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, *, n_images: int) -> None:
        self.recipe = recipe
        self.model = model
        self.batch_size = min(recipe.batch_size, n_images)
        self.steps = n_images // self.batch_size
        self.optimizer = _optimizer(recipe, model)
        self.average = Average(model, recipe.average) if recipe.average else None
        self._added = 0  # parts of a batch
        if recipe.step_epochs:
            self.schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.StepLR(
                self.optimizer, recipe.step_epochs, recipe.step_factor
            )
        else:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                max_lr=recipe.learning_rate,
                total_steps=recipe.epochs * self.steps,
            )

    @property
    def tested(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.model if self.average is None else self.average.model

    def batches(self, shuffled: Tensor) -> Sequence[Tensor]:
        """The positions int64 (n,) of an epoch's images, as they are learned from."""
        if not self.recipe.step_epochs:
            shuffled = shuffled[: self.steps * self.batch_size]
        return shuffled.split(max(1, self.batch_size // self.recipe.parts))

    def learn(self, inputs: Tensor, labels: Tensor) -> None:
        """From float (k, 3, R, R) in [-1, 1] and int64 (k,); a step once a batch is together."""
        loss = F.cross_entropy(
            self.model(inputs), labels, label_smoothing=self.recipe.label_smoothing
        )
        if not self._added:
            self.optimizer.zero_grad(set_to_none=True)
        (loss / self.recipe.parts).backward()
        self._added += 1
        if self._added < self.recipe.parts:
            return
        self._added = 0
        self.optimizer.step()
        if not self.recipe.step_epochs:
            self.schedule.step()
        if self.average is not None:
            self.average.follow(self.model)

    def end_epoch(self) -> None:
        """Once all images of an epoch were seen."""
        if self.recipe.step_epochs:
            self.schedule.step()
        if self.average is not None:
            self.average.take_buffers(self.model)


class Average:
    """Exponential moving average of a network's weights, which starts to forget at once.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's.

    Args:
        model: The network at its start.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """After each step of the network."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)

    def take_buffers(self, model: nn.Module) -> None:
        """Statistics of normalisation layers are the network's own."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    weights = model.parameters()
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(weights, momentum=0.9, **options)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(weights, **options)
    return torch.optim.AdamW(weights, **options)
