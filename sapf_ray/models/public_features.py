"""What public networks say of an image: the features in which records vote, class means are
released and synthetic images are labelled.

No network here was trained on the sensitive images, so its features cost nothing; what is summed
over records is charged where it is summed.

Example::

    features = make_features("glyphs", ModelConfig(path="glyphs-tiny"))
    features(images).shape          # (n, 96) float32 from uint8 (n, R, R, 3)

References:
    1. Radford et al. Learning transferable visual models from natural language supervision. ICML
       2021. (CLIP)
    2. Oquab et al. DINOv2: learning robust visual features without supervision. TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sapf_ray.config import ModelConfig
from sapf_ray.errors import DataError, reason
from sapf_ray.files import file_digest, short_hash
from sapf_ray.models.device import pick_device
from sapf_ray.models.glyph_features import BUNDLED_FEATURES, WEIGHTS_NAME, load_glyph_features
from sapf_ray.models.inception import check_inception_weights, kept_inception
from sapf_ray.models.vae import posterior_parameters

BATCH = 64  # images of a forward pass
LATENT_SIDE = 8  # positions that latent features keep, each way
NETWORK_SIDE = 224  # pixels that CLIP and DINOv2 were trained on
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Features(Protocol):
    """Public features of images. Must pickle; row i must depend on image i alone."""

    @property
    def of_latents(self) -> bool:
        """Whether they are made of the moments of the images' VAE posteriors."""

    @property
    def key(self) -> str:
        """Digest of all that decides the features, the network's weights included."""

    def __call__(self, images: np.ndarray, moments: np.ndarray | None = None) -> np.ndarray:
        """Features of images.

        Args:
            images: uint8 (n, R, R, 3).
            moments: (n, 2C, h, w) of their VAE posteriors, where the caller has them: latents are
                then not computed again.

        Returns:
            float32 (n, d).
        """


@dataclass(frozen=True)
class GlyphSpace:
    """The shipped network, trained on public rendered characters; for digit-like images."""

    gpus: float = 0.0
    of_latents: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return "glyphs-" + file_digest(BUNDLED_FEATURES / WEIGHTS_NAME)[:16]

    def __call__(self, images: np.ndarray, moments: np.ndarray | None = None) -> np.ndarray:
        device = pick_device(self.gpus)
        net = kept_glyphs(device)
        return in_batches(lambda part: net.features(to_pixels(part, device).float() / 255), images)


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Latent mean of the public model's VAE, averaged down to at most 8 x 8 positions: always
    there, and a weak but honest description of any image.
    """

    model: ModelConfig
    gpus: float = 0.0
    of_latents: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return "latents"  # the model's weights are part of what the caller keys by

    def __call__(self, images: np.ndarray, moments: np.ndarray | None = None) -> np.ndarray:
        if moments is None:
            from sapf_ray.models.loading import kept_pipeline  # diffusers

            pipe = kept_pipeline(self.model, pick_device(self.gpus))
            moments = posterior_moments(pipe.vae, images)
        means = torch.from_numpy(moments[:, : moments.shape[1] // 2])
        side = min(LATENT_SIDE, *means.shape[-2:])
        return F.adaptive_avg_pool2d(means, side).flatten(1).numpy()


@dataclass(frozen=True, kw_only=True)
class NetworkSpace:
    """Image embedding of CLIP or DINOv2, from a directory or hub id as transformers reads it.

    Images are resized to 224 pixels and normalised as the network's own processor does.
    """

    path: str
    gpus: float = 0.0
    of_latents: ClassVar[bool] = False

    @cached_property
    def key(self) -> str:
        return "network-" + short_hash([self.path, _weight_digests(self.path)])

    def __call__(self, images: np.ndarray, moments: np.ndarray | None = None) -> np.ndarray:
        device = pick_device(self.gpus)
        net, pixels = _kept_network(self.path, device)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in pixels)

        def embed(part: np.ndarray) -> Tensor:
            scaled = to_pixels(part, device).float() / 255
            side = (NETWORK_SIDE, NETWORK_SIDE)
            scaled = F.interpolate(scaled, side, mode="bicubic", antialias=True).clamp(0, 1)
            found = net(pixel_values=(scaled - mean) / std)
            embeds = getattr(found, "image_embeds", None)
            return found.pooler_output if embeds is None else embeds

        return in_batches(embed, images)


@dataclass(frozen=True, kw_only=True)
class InceptionSpace:
    """Inception-v3 pool features, the same as for FID."""

    weights: str
    gpus: float = 0.0
    of_latents: ClassVar[bool] = False

    @cached_property
    def key(self) -> str:
        return "inception-" + file_digest(Path(self.weights))[:16]

    def __call__(self, images: np.ndarray, moments: np.ndarray | None = None) -> np.ndarray:
        device = pick_device(self.gpus)
        net = kept_inception(self.weights, device)
        return in_batches(lambda part: net(to_pixels(part, device))[0], images)


def make_glyphs(name: str, model: ModelConfig, gpus: float) -> Features:
    """Row ``glyphs`` of the table."""
    return GlyphSpace(gpus)


def make_latents(name: str, model: ModelConfig, gpus: float) -> Features:
    """Row ``latents`` of the table."""
    return LatentSpace(model=model, gpus=gpus)


def make_network(name: str, model: ModelConfig, gpus: float) -> Features:
    """Row ``network`` of the table: a file holds Inception's weights, all else is CLIP or DINOv2.

    Raises:
        DataError: Not there, or another kind of network.
    """
    if Path(name).expanduser().is_file():
        check_inception_weights(str(Path(name).expanduser()), "grounding.features")
        return InceptionSpace(weights=str(Path(name).expanduser()), gpus=gpus)
    local = Path(name).expanduser()
    path = str(local.resolve()) if local.is_dir() else name
    _network_class(path)
    return NetworkSpace(path=path, gpus=gpus)


@torch.no_grad()
def posterior_moments(vae: Any, images: np.ndarray) -> np.ndarray:
    """Moments float32 (n, 2C, h, w) of the VAE posteriors of images uint8 (n, R, R, 3)."""

    def encode(part: np.ndarray) -> Tensor:
        pixels = to_pixels(part, vae.device).to(vae.dtype)
        return posterior_parameters(vae, pixels / 127.5 - 1)

    return in_batches(encode, images)


@torch.no_grad()
def in_batches(
    embed: Callable[[np.ndarray], Tensor], samples: np.ndarray, *, size: int = BATCH
) -> np.ndarray:
    """What ``embed`` says of all samples, ``size`` at a time, as float32 in memory."""
    parts = [embed(samples[start : start + size]) for start in range(0, len(samples), size)]
    return torch.cat(parts).float().cpu().numpy()


def to_pixels(images: np.ndarray, device: str | torch.device) -> Tensor:
    """uint8 (n, h, w, 3) to a tensor uint8 (n, 3, h, w)."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)


@lru_cache(maxsize=1)
def kept_glyphs(device: str) -> Any:
    """The shipped feature network, kept by a worker process between its tasks."""
    return load_glyph_features().to(device)


def _network_class(path: str) -> tuple[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Name of the class in transformers, and mean and deviation of its pixels.

    Raises:
        DataError: No network there, or neither CLIP nor DINOv2.
    """
    import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise DataError(
            f"grounding.features = {path!r}: must be auto, glyphs, latents, or the directory or "
            f"hub id of CLIP or DINOv2, or Inception's weights file ({reason(error)})"
        ) from error
    if kind in ("clip", "clip_vision_model"):
        return "CLIPVisionModelWithProjection", CLIP_PIXELS
    if kind.startswith("dinov2"):
        return "AutoModel", IMAGENET_PIXELS
    raise DataError(
        f"grounding.features = {path!r}: a network of type {kind}; must be CLIP or DINOv2"
    )


@lru_cache(maxsize=1)
def _kept_network(path: str, device: str) -> tuple[Any, tuple[tuple[float, ...], ...]]:
    import transformers

    name, pixels = _network_class(path)
    try:
        net = getattr(transformers, name).from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"grounding.features = {path!r}: cannot be read ({reason(error)})"
        ) from error
    return net.requires_grad_(False).eval().to(device), pixels


def _weight_digests(path: str) -> list[str]:
    """Digests of a local network's files; a hub id has none, its revision is the hub's."""
    if not Path(path).is_dir():
        return []
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    return [file_digest(file) for file in files]
