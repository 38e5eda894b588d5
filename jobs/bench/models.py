"""Model sizes of the benchmark and the work every contender is given.

The same records, draws and losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sapf_ray.latents import CONDITIONS, LatentCache
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import Draws, draw, per_record_loss
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import Diffusion
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.saliency.scores import n_selected


@dataclass(frozen=True, kw_only=True)
class Size:
    """A U-Net with Stable Diffusion 1.5's layout: four levels, two layers each, 96 q/k/v matrices.

    Attributes:
        channels: Width of the levels; published: (320, 640, 1280, 1280), 859.5 M parameters.
        context: Width of the prompt embeddings.
        tokens: Length of a prompt.
        side: Side of the latents, unless a case says otherwise.
        heads: Attention heads.
        vae: Channels of the VAE's levels.
        text_layers: Layers of the text encoder.
    """

    channels: tuple[int, ...]
    context: int
    tokens: int
    side: int
    heads: int = 8
    groups: int = 32
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text_layers: int = 12


EMBEDDED = "embedded"
SIZES: dict[str, Size | None] = {
    EMBEDDED: None,  # the bundled model with its trained weights
    "tiny": Size(
        channels=(8, 8, 16, 16),
        context=16,
        tokens=8,
        side=8,
        heads=2,
        groups=4,
        vae=(8, 8, 8, 8),
        text_layers=1,
    ),  # smoke tests
    "sd": Size(
        channels=(96, 192, 384, 384),
        context=768,
        tokens=77,
        side=16,
        vae=(64, 128, 256, 256),
        text_layers=2,
    ),
    "sd15-256": Size(
        channels=(320, 640, 1280, 1280),
        context=768,
        tokens=77,
        side=32,
    ),
    "sd15-512": Size(
        channels=(320, 640, 1280, 1280),
        context=768,
        tokens=77,
        side=64,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one contender has to do.

    Attributes:
        size: Row of :data:`SIZES`.
        batch: Records, or images, per forward pass.
        records: Records of one step, in micro-batches of ``batch``; 0 is one micro-batch.
        side: Side of the latents; 0 is the size's own.
        pool: Matrices of the pool, evenly spread with the first and the last among them; 0 is all
            of them.
        rank: Rank of the LoRA factors.
        directory: Scratch, shared by the contenders of a group.
    """

    size: str
    batch: int
    records: int = 0
    side: int = 0
    pool: int = 0
    rank: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    directory: str = ""

    @property
    def n(self) -> int:
        return self.records or self.batch


def build_unet(size: str) -> UNet2DConditionModel:
    """The size's U-Net; random weights except the embedded model's."""
    spec = SIZES[size]
    if spec is None:
        return load_pipeline("glyphs-tiny").unet
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=spec.side,
        in_channels=4,
        out_channels=4,
        block_out_channels=spec.channels,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=spec.context,
        attention_head_dim=spec.heads,
        norm_num_groups=spec.groups,
    )


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def evenly_spread(names: list[str], count: int) -> list[str]:
    """``count`` of the names, the first and the last among them."""
    return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def write_pipeline(size: str, directory: Path) -> str:
    """Path of a diffusers pipeline of this size; the embedded one needs no writing."""
    spec = SIZES[size]
    if spec is None:
        return "glyphs-tiny"
    if (directory / "model_index.json").exists():
        return str(directory)
    tokenizer = load_pipeline("glyphs-tiny").tokenizer
    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=spec.vae,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=spec.groups,
        sample_size=8 * spec.side,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=max(len(tokenizer), 512),
            hidden_size=spec.context,
            intermediate_size=4 * spec.context,
            num_hidden_layers=spec.text_layers,
            num_attention_heads=max(1, spec.context // 64),
            max_position_embeddings=max(spec.tokens, tokenizer.model_max_length),
        )
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=build_unet(size),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return str(directory)


class Workload:
    """A denoiser and random records.

    Reading and draws go through the product's own code, for rivals too.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = getattr(torch, case.dtype)
        pipe = load_pipeline("glyphs-tiny")
        spec = SIZES[case.size]
        self.unet: nn.Module = (
            build_unet(case.size).to(case.device, self.dtype).eval().requires_grad_(False)
        )
        source = pipe if spec is None else SimpleNamespace(scheduler=build_scheduler())
        self.process = Diffusion(DDPMScheduler.from_config(source.scheduler.config))
        self.scale = LatentScale.of(pipe.vae) if spec is None else LatentScale(factor=0.18215)
        tokens, context = (
            (pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
            if spec is None
            else (spec.tokens, spec.context)
        )
        side = case.side or (pipe.unet.config.sample_size if spec is None else spec.side)
        self.cache = _random_cache(case, side, tokens=tokens, context=context)
        self.key = NoiseKey.create(0)
        self.step = 0

    def pool(self) -> dict[str, nn.Linear]:
        pool = {
            name: layer
            for name, layer in candidate_pool(self.unet).items()
            if isinstance(layer, nn.Linear)
        }
        return {name: pool[name] for name in evenly_spread(list(pool), self.case.pool or len(pool))}

    def selected(self) -> list[str]:
        """As many matrices as a selection keeps by default."""
        names = list(candidate_pool(self.unet))
        return evenly_spread(names, n_selected(len(names), 0.3))

    def micro_batches(self) -> Iterator[np.ndarray]:
        for start in range(0, self.case.n, self.case.batch):
            yield np.arange(start, min(start + self.case.batch, self.case.n))

    def inputs(self, records: np.ndarray) -> tuple[Tensor, Conditions, Draws]:
        """Moments, conditions and draws of the records, as the stages read them."""
        moments, conditions = self.cache.read(records)
        draws = draw(
            self.key,
            "benchmark",
            self.step,
            records,
            k=1,
            latent_shape=self.cache.latent_shape,
            process=self.process,
        )
        return moments, conditions.to(self.case.device, self.dtype), draws

    def losses(self, records: np.ndarray, denoiser: Any = None) -> Tensor:
        """(n,) losses with their graph."""
        moments, conditions, draws = self.inputs(records)
        return per_record_loss(
            denoiser or self.unet,
            self.process,
            moments=moments,
            scale=self.scale,
            conditions=conditions,
            draws=draws,
        )


def _random_cache(
    case: Case,
    side: int,
    *,
    tokens: int,
    context: int,
) -> LatentCache:
    directory = Path(tempfile.mkdtemp(dir=case.directory or None))
    generator = np.random.default_rng(0)
    np.save(
        directory / "moments.npy", generator.normal(size=(case.n, 8, side, side)).astype(np.float32)
    )
    np.save(directory / "labels.npy", np.arange(case.n) % 10)
    states = generator.normal(size=(10, tokens, context)).astype(np.float32)
    Conditions(states=torch.from_numpy(states)).save(directory / CONDITIONS)
    return LatentCache(str(directory))
