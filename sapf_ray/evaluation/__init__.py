"""Scores of synthetic images: Fréchet distance and downstream accuracy."""

from __future__ import annotations

from sapf_ray.evaluation.downstream import train_and_score
from sapf_ray.evaluation.fidelity import frechet_distance
from sapf_ray.evaluation.protocol import check_evaluation, evaluate

__all__ = ["check_evaluation", "evaluate", "frechet_distance", "train_and_score"]
