"""Sampling of the synthetic data set."""

from __future__ import annotations

from sapf_ray.synthesis.launcher import synthesize
from sapf_ray.synthesis.writer import read_manifest, read_synthetic

__all__ = ["read_manifest", "read_synthetic", "synthesize"]
