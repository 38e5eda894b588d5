"""The public model."""

from __future__ import annotations

from typing import Annotated, Literal

from sapf_ray.config.kinds import Count, CountOrZero, FromList
from sapf_ray.config.section import require, section


@section("model")
class ModelConfig:
    """The public model.

    Args:
        path: A name of ``sapf models`` (glyphs-tiny, sd-v1-5, ...), a local diffusers directory, or
            a hub id.
        resolution: Side in pixels of the images that are encoded, trained on and made; null: the
            size that the model was made for. The paper has Stable Diffusion at 256.
        dtype: Precision of the frozen weights and of forward passes: float32 or bfloat16.
        class_labels: Label ids of a class-conditional model (DiT): one per class, in the data set's
            order; by default the labels whose names stand in the prompts.
    """

    path: str = "glyphs-tiny"
    resolution: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    class_labels: Annotated[tuple[CountOrZero, ...], FromList] | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.path),
            "model.path",
            self.path,
            "must name a bundled model, a directory or a hub id",
        )
        require(
            self.class_labels != (),
            "model.class_labels",
            self.class_labels,
            "must name one label id per class, or be null",
        )
