"""The remedy ``head`` in a run: its release in the stage ``grounding``.

Its labels in synthesis are :mod:`sapf_ray.grounding.head_labels`.
"""

from __future__ import annotations

import math
from typing import Any

from sapf_ray.errors import ConfigError
from sapf_ray.grounding.head import exact_sum, group_sum, release_head
from sapf_ray.grounding.head_price import directions
from sapf_ray.grounding.public_spread import public_spread
from sapf_ray.latents import LatentCache
from sapf_ray.models.feature_table import feature_row
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs.context import RunContext


def make_head(run: RunContext) -> dict[str, Any]:
    """The remedy's part of the stage: makes its release; returns what ``grounding.json`` is to
    hold.
    """
    features = run.features
    assert features is not None and run.plan.head is not None
    spread = public_spread(run, features)
    n_classes = len(run.source.class_names)
    cache = LatentCache(str(run.latents), units=run.units_file)
    groups = cache.groups
    # k images of as many classes have a norm of the root of k
    weight = float(run.plan.n_records)
    if groups is not None:
        weight = math.sqrt(len(groups) * len(groups.images))
    size = directions(
        weight / n_classes,
        run.plan.head.noise_multiplier,
        dimension=len(spread.centre),
    )
    projection = spread.projection(size, kind=features.key)
    if groups is None:
        total = exact_sum(cache.record_features(), projection, n_classes=n_classes)
    else:
        total = group_sum(cache.group_features(), projection, n_classes=n_classes)
    head = release_head(total, projection, releaser=run.releaser)
    head.save(run.directory.head)
    settings = run.config.grounding
    return {
        "head": {
            "features": feature_row(settings.features, run.config.model.path),
            "directions": projection.size,
            "reliability": round(head.reliability, 4),
            "labels": settings.labels if head.useful else "prompt",
        }
    }


def check_head(plan: PrivacyPlan, n_classes: int) -> None:
    """Finds what would stop a head; spends nothing.

    Raises:
        ConfigError: There is one class alone.
    """
    if plan.head is not None and n_classes < 2:
        raise ConfigError(
            "grounding.remedies", "head", "must be left out where there is one class alone"
        )
