"""The remedy ``head`` in a run: its release in the stage ``grounding``.

Its labels in synthesis are :mod:`sapf_ray.grounding.head_labels`.
"""

from __future__ import annotations

from typing import Any

from sapf_ray.errors import ConfigError
from sapf_ray.grounding.head import release_head
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
    size = directions(
        run.plan.n_records / n_classes,
        run.plan.head.noise_multiplier,
        dimension=len(spread.centre),
    )
    projection = spread.projection(size, kind=features.key)
    head = release_head(
        LatentCache(str(run.latents)).record_features(),
        projection,
        n_classes=n_classes,
        releaser=run.releaser,
        parts=run.vote_parts,
    )
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
