"""The public model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from sapf_ray.config.kinds import Count, CountOrZero, FromList
from sapf_ray.config.section import require, section


@section("model")
class ModelConfig:
    """The public model.

    Args:
        path: A name of ``sapf models`` (glyphs-tiny, sd-v1-5, ...), a local diffusers directory, a
            single .safetensors checkpoint, or a hub id.
        variant: Variant of the weights, as fp16, of a folder that has one; null: the usual ones.
        revision: Branch, tag or commit of a model of the hub; null: its main branch, or the copy
            that is in the cache.
        configs: Folder of a diffusers pipeline whose configs and tokenizer a single .safetensors
            checkpoint goes with; null: Stable Diffusion 1's in the hub's cache, where it is one.
        prediction_type: What the denoiser predicts; null: what its scheduler says, and epsilon
            where that says nothing.
        resolution: Side in pixels of the images that are encoded, trained on and made; null: the
            size that the model was made for. The paper has Stable Diffusion at 256.
        dtype: Precision of the frozen weights and of forward passes. float16 is for GPUs without
            bfloat16; the VAE then stays in float32, and trained factors always are.
        class_labels: Label ids of a class-conditional model (DiT): one per class, in the data set's
            order; by default the labels whose names stand in the prompts.
    """

    path: str = "glyphs-tiny"
    variant: str | None = None
    revision: str | None = None
    configs: str | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    resolution: Count | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    class_labels: Annotated[tuple[CountOrZero, ...], FromList] | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.path),
            "model.path",
            self.path,
            "must name a bundled model, a directory or a hub id",
        )
        for key in ("variant", "revision"):
            value = getattr(self, key)
            require(
                value is None or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", value) is not None,
                f"model.{key}",
                value,
                "must be letters, digits, and . _ - between them",
            )
        require(
            self.class_labels != (),
            "model.class_labels",
            self.class_labels,
            "must name one label id per class, or be null",
        )
