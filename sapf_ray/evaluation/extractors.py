"""Networks in the form that torch-fidelity asks for; importing this module registers them there."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import torch_fidelity
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sapf_ray.evaluation.features import GLYPH_EXTRACTOR
from sapf_ray.evaluation.protocols import PYTORCH_FID_EXTRACTOR
from sapf_ray.models.glyph_features import FEATURE_DIM, load_glyph_features


class GlyphExtractor(FeatureExtractorBase):
    """The shipped glyph network in the form torch-fidelity asks for."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.net = load_glyph_features()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (str(FEATURE_DIM), "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(FEATURE_DIM)

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """uint8 (n, 3, h, w) of any size → float64 (n, d), one of each layer asked for."""
        features = self.net.features(input.float() / 255)
        found = {str(FEATURE_DIM): features, "logits": self.net.head(features)}
        return tuple(found[layer].double() for layer in self.features_list)


class PytorchFidExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception on images that are brought to size as pytorch-fid does.

    DPImageBench extracts features through pytorch-fid (``fld.features.InceptionFeatureExtractor``):
    bilinear in PyTorch's coordinates and [-1, 1], where TensorFlow's graph has others. The weights
    are the same.
    """

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list, **kwargs)
        self.brought: Tensor | None = None
        # forward brings them to size its own way first; its first layer sees ours instead
        self.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: (self.brought,))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = (self.INPUT_IMAGE_SIZE, self.INPUT_IMAGE_SIZE)
        unit = x.to(self.feature_extractor_internal_dtype) / 255
        self.brought = 2 * F.interpolate(unit, size, mode="bilinear", align_corners=False) - 1
        return super().forward(x)


torch_fidelity.register_feature_extractor(GLYPH_EXTRACTOR, GlyphExtractor)
torch_fidelity.register_feature_extractor(PYTORCH_FID_EXTRACTOR, PytorchFidExtractor)
