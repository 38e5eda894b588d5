"""Table of public features: the spaces in which grounding compares images.

Importing this module loads no network; looking up a row does.

>>> feature_row("auto", "glyphs-tiny"), feature_row("auto", "owner/model")
('glyphs', 'latents')
>>> feature_row("facebook/dinov2-small", "glyphs-tiny")
'network'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from sapf_ray.config import ModelConfig, RunConfig
from sapf_ray.models.location import bundled_models
from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from sapf_ray.models.public_features import Features
    from sapf_ray.privacy.planner import PrivacyPlan

AUTO = "auto"
NETWORK = "network"

# (value of the setting, public model, share of a GPU) to the features; may raise DataError where
# what it needs is missing, before a run spends anything.
MakeFeatures: TypeAlias = "Callable[[str, ModelConfig, float], Features]"

FEATURES: Registry[MakeFeatures] = Registry(
    "grounding.features",
    {
        "glyphs": "sapf_ray.models.public_features:make_glyphs",
        "latents": "sapf_ray.models.public_features:make_latents",
        NETWORK: "sapf_ray.models.public_features:make_network",
    },
)
"""Name of a row to constructor; a setting that names no row is the path or hub id of a network."""


def feature_row(name: str, model_path: str) -> str:
    """The row of :data:`FEATURES` that a setting leads to.

    Args:
        name: Value of ``grounding.features``.
        model_path: Value of ``model.path``; the bundled networks belong together.
    """
    if name == AUTO:
        return "glyphs" if model_path in bundled_models() else "latents"
    return name if name in FEATURES else NETWORK


def make_features(name: str, model: ModelConfig, *, gpus: float = 0.0) -> Features:
    """The features that a setting names. Reads no record; call it before a run spends anything.

    Args:
        name: Value of ``grounding.features``.
        model: The public model.
        gpus: Share of a GPU that the calling tasks hold; 0 computes on the CPU.

    Raises:
        DataError: No such network, or it cannot be used.
    """
    return FEATURES[feature_row(name, model.path)](name, model, gpus)


def record_features(config: RunConfig, plan: PrivacyPlan) -> Features | None:
    """The features that a run keeps of its records; None where no remedy compares images.

    Args:
        config: The whole experiment.
        plan: Its privacy plan.

    Raises:
        DataError: No such network, or it cannot be used.
    """
    if plan.vote is None and plan.head is None:
        return None
    return make_features(config.grounding.features, config.model, gpus=config.saliency.gpus)
