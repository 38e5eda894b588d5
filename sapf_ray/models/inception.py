"""Inception-v3 as torch-fidelity computes it, from a weights file of the user's."""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

from sapf_ray.errors import DataError

INCEPTION_EXTRACTOR = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


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


@lru_cache(maxsize=1)
def kept_inception(weights: str, device: str) -> Any:
    """The network: uint8 (n, 3, h, w) to a tuple of pool features float32 (n, 2048)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return (
        FeatureExtractorInceptionV3(
            INCEPTION_EXTRACTOR, ["2048"], feature_extractor_weights_path=weights
        )
        .eval()
        .to(device)
    )
