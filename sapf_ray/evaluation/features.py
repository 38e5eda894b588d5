"""Table of feature spaces in which sets of images are compared.

``inception`` uses Inception-v3 pool features, comparable with published numbers, and needs
torch-fidelity's weights file. ``glyph`` uses the small network that ships with the package (trained
on public rendered characters), works offline, and is comparable with nothing but itself. Importing
this module loads no network and no library of networks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray.config import EvaluationConfig
from sapf_ray.errors import DataError
from sapf_ray.registry import Registry

GLYPH_EXTRACTOR = "sapf-glyph"
INCEPTION_EXTRACTOR = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def _nothing(config: EvaluationConfig) -> None:
    """These features need no file of the user's."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """One network whose features describe an image.

    Attributes:
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

    options: Callable[[EvaluationConfig], dict[str, Any]] = lambda config: {}
    check: Callable[[EvaluationConfig], None] = _nothing
    cacheable: bool = False
    stands_for: Callable[[EvaluationConfig], str] | None = None


def _glyph(config: EvaluationConfig) -> dict[str, Any]:
    import sapf_ray.evaluation.fidelity  # noqa: F401 registers the extractor

    return {"feature_extractor": GLYPH_EXTRACTOR}


def _inception(config: EvaluationConfig) -> dict[str, Any]:
    return {
        "feature_extractor": INCEPTION_EXTRACTOR,
        "feature_extractor_weights_path": config.inception_weights,
    }


def check_inception_weights(
    path: str | None, setting: str = "evaluation.inception_weights"
) -> None:
    """Refuses a file that does not hold torch-fidelity's Inception-v3 weights.

    Args:
        path: The file.
        setting: Key of the configuration that named it, for the message.

    Raises:
        DataError: Missing, truncated, or weights of another network.
    """
    expected = f"expected torch-fidelity's {INCEPTION_WEIGHTS} (about 91 MB)"
    where = f"{setting} = {path!r}"
    if path is None or not Path(path).is_file():
        raise DataError(f"{where}: no such file; {expected}")
    import torch

    try:
        # weights_only: torch-fidelity itself would unpickle anything
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{where}: truncated, or not a PyTorch weights file; {expected}") from error
    if not isinstance(state, dict) or "Mixed_7c.branch1x1.conv.weight" not in state:
        raise DataError(f"{where}: weights of another network; {expected}")


def _best_available(config: EvaluationConfig) -> str:
    return "glyph" if config.inception_weights is None else "inception"


FEATURES: Registry[FeatureSpace] = Registry(
    "evaluation.fid_features",
    {
        "auto": FeatureSpace(stands_for=_best_available),
        "glyph": FeatureSpace(options=_glyph),
        "inception": FeatureSpace(
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
