"""The remedy ``head`` after its release: the labels of synthetic images."""

from __future__ import annotations

from sapf_ray.grounding.head_price import candidates_an_image
from sapf_ray.models.class_head import ClassHead
from sapf_ray.models.feature_table import make_features
from sapf_ray.runs.context import RunContext
from sapf_ray.synthesis.labelling import Labelling


def labelling(run: RunContext) -> Labelling | None:
    """How synthetic images get their labels; None where they have those of their prompts: without
    this remedy, and where the head knows itself to be little better than a guess.
    """
    if run.plan.head is None or not ClassHead.load(run.directory.head).useful:
        return None
    settings = run.config.grounding
    return Labelling(
        head=str(run.directory.head.resolve()),
        features=make_features(settings.features, run.config.model, gpus=run.config.synthesis.gpus),
        rule=settings.labels,
        oversample=candidates_an_image(run.config),
    )
