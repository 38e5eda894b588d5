"""Values of any type as grey levels of 8 bits."""

from __future__ import annotations

import numpy as np

PixelRange = tuple[float, ...]  # the values that are shown black and white


def grey_levels(values: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Values of any type as uint8 of the same shape: the range's ends become 0 and 255.

    Raises:
        ValueError: A value is NaN.
    """
    low, high = pixel_range
    share = (values.astype(np.float64) - low) / (high - low)
    if np.isnan(share).any():
        raise ValueError("has pixels that are no number (NaN)")
    return (share.clip(0, 1) * 255).round().astype(np.uint8)
