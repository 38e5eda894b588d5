"""The space in which records are compared with what the public model shows: public features,
whitened by the spread of one candidate's images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHRINKAGE = 0.1
"""Least share of the mean variance that is added to every direction's, so that none counts without
bound; more where there are few images for the number of directions."""


@dataclass(frozen=True)
class Whitening:
    """Linear map (d, d) under which the images of one candidate spread alike in all directions."""

    map: np.ndarray

    @classmethod
    def of(cls, shown: np.ndarray) -> Whitening:
        """From features (candidates, images, d) of the candidates' images."""
        d = shown.shape[-1]
        values = shown.astype(np.float64)
        rest = (values - values.mean(1, keepdims=True)).reshape(-1, d)
        freedom = max(1, len(rest) - len(shown))
        covariance = rest.T @ rest / freedom
        added = max(SHRINKAGE, d / freedom) * np.trace(covariance) / d
        covariance += (added + 1e-12) * np.eye(d)
        eigenvalues, vectors = np.linalg.eigh(covariance)
        return cls(vectors / np.sqrt(eigenvalues))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Whitened features float64 (..., d)."""
        return features.astype(np.float64) @ self.map
