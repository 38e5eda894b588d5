"""Table of feature spaces in which sets of images are compared.

``inception`` uses Inception-v3 pool features, comparable with published numbers, and needs
torch-fidelity's weights file. ``glyph`` uses the small network that ships with the package (trained
on public rendered characters), works offline, and is comparable with nothing but itself. Importing
this module loads no network and no library of networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sapf_ray.config import EvaluationConfig
from sapf_ray.evaluation.protocols import protocol_of
from sapf_ray.models.inception import check_inception_weights
from sapf_ray.registry import Registry

GLYPH_EXTRACTOR = "sapf-glyph"


def _nothing(config: EvaluationConfig) -> None:
    """These features need no file of the user's."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """One network whose features describe an image.

    Attributes:
        layer: The network's layer that distances are measured in.
        logits: That of its classes, for Inception score.
        options: From the settings to the keyword arguments of ``torch_fidelity.calculate_metrics``
            that choose the network. Called in the process that computes, so it may register an
            extractor there.
        check: Raises a one-line :class:`DataError` where the settings do not suffice; called before
            a run spends anything.
        cacheable: Whether the network is so slow that features of the real images are kept in
            ``evaluation.cache_dir``.
        stands_for: Of a row that is another one in disguise: from the settings to the name of the
            row that is meant.
    """

    layer: str = ""
    logits: str = ""
    options: Callable[[EvaluationConfig], dict[str, Any]] = lambda config: {}
    check: Callable[[EvaluationConfig], None] = _nothing
    cacheable: bool = False
    stands_for: Callable[[EvaluationConfig], str] | None = None


def _glyph(config: EvaluationConfig) -> dict[str, Any]:
    import sapf_ray.evaluation.extractors  # noqa: F401 registers it

    return {"feature_extractor": GLYPH_EXTRACTOR}


def _inception(config: EvaluationConfig) -> dict[str, Any]:
    import sapf_ray.evaluation.extractors  # noqa: F401 registers one of them

    return {
        "feature_extractor": protocol_of(config).inception,
        "feature_extractor_weights_path": config.inception_weights,
    }


def _best_available(config: EvaluationConfig) -> str:
    return "glyph" if config.inception_weights is None else "inception"


FEATURES: Registry[FeatureSpace] = Registry(
    "evaluation.fid_features",
    {
        "auto": FeatureSpace(stands_for=_best_available),
        "glyph": FeatureSpace(layer="96", logits="logits", options=_glyph),
        "inception": FeatureSpace(
            layer="2048",
            logits="logits_unbiased",
            options=_inception,
            check=lambda config: check_inception_weights(config.inception_weights),
            cacheable=True,
        ),
    },
)
"""Value of ``evaluation.fid_features`` to feature space."""


def feature_space_name(config: EvaluationConfig) -> str:
    """The row of :data:`FEATURES` that these settings lead to.

    Raises:
        ConfigError: No such row.
    """
    space = FEATURES[config.fid_features]
    if space.stands_for is not None:
        return space.stands_for(config)
    return config.fid_features
