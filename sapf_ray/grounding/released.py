"""The remedy ``proportions`` after its release: how many synthetic images each class gets."""

from __future__ import annotations

from dataclasses import replace

from sapf_ray.config import SynthesisConfig
from sapf_ray.grounding.stage import found
from sapf_ray.runs.context import RunContext


def in_proportions(run: RunContext) -> SynthesisConfig:
    """The settings of synthesis, with the released proportions where the run has some and none are
    given.
    """
    config = run.config.synthesis
    released = found(run).get("proportions", ())
    return replace(config, class_proportions=config.class_proportions or tuple(released))
