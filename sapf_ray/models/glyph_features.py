"""A small public classifier of glyphs whose penultimate features serve the offline ``fid_glyph``.

It was trained on rendered characters only (:mod:`sapf_ray.glyphs`). Distances in its feature
space compare digit-like images; they are never comparable with FID on Inception-v3 features.

>>> net = load_glyph_features()
>>> net.features(torch.rand(2, 3, 32, 32)).shape
torch.Size([2, 96])
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sapf_ray.errors import DataError, reason
from sapf_ray.glyphs import CHARACTERS, IMAGE_SIDE

FEATURE_DIM = 96
WEIGHTS_NAME = "model.safetensors"
BUNDLED_FEATURES = Path(__file__).parent / "bundled" / "glyph-features"


class GlyphFeatures(nn.Module):
    """CNN from RGB images in [0, 1] to the 62 classes of ``CHARACTERS``.

    Group normalisation and no dropout: an image's features depend neither on its batch nor on
    train/eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(3, 24, stride=1),
            _block(24, 48, stride=2),  # 16 x 16
            _block(48, 64, stride=1),
            _block(64, 96, stride=2),  # 8 x 8
            _block(96, FEATURE_DIM, stride=2),  # 4 x 4
        )
        self.head = nn.Linear(FEATURE_DIM, len(CHARACTERS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images float (n, 3, h, w) in [0, 1], any size -> features (n, 96), not normalised."""
        if images.shape[-2:] != (IMAGE_SIDE, IMAGE_SIDE):
            size = (IMAGE_SIDE, IMAGE_SIDE)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.body(2 * images - 1).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images float (n, 3, h, w) in [0, 1] -> logits (n, 62)."""
        return self.head(self.features(images))


def load_glyph_features(directory: Path = BUNDLED_FEATURES) -> GlyphFeatures:
    """The shipped network in float32, in eval mode, without gradients.

    Raises:
        DataError: The weights are missing, truncated or of another network.
    """
    path = Path(directory) / WEIGHTS_NAME
    net = GlyphFeatures()
    try:
        state = load_file(path)
        net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; `python -m jobs.pretrain_public` writes it"
        ) from error
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DataError(f"{path}: not the weights of GlyphFeatures ({reason(error)})") from error
    return net.eval().requires_grad_(False)


def _block(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8, channels_out),
        nn.ReLU(),
    )
