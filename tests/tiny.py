"""A Stable-Diffusion-shaped pipeline with random weights, a few ten thousand parameters: for unit
tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sapf_ray.latents import CONDITIONS, LatentCache
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.loading import load_pipeline


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


# One token each; all else is read letter by letter, and cut off at 16.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ["an", "image", "of", "the", "digit", *DIGITS]


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Merges of a byte-pair encoding by which each word becomes one token."""
    found: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        whole = letters[0]
        for letter in letters[1:]:
            found[whole, letter] = None
            whole += letter
    return list(found)


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters, and one token for each of ``WORDS``; 16 tokens a prompt."""
    characters = [chr(c) for c in range(33, 127)]
    vocabulary = [
        "<|startoftext|>",
        "<|endoftext|>",
        *characters,
        *(c + "</w>" for c in characters),
        *dict.fromkeys(first + second for first, second in merges_of(WORDS)),
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges_of(WORDS),
        model_max_length=16,
    )


def save_tiny_pipeline(directory: Path, prediction_type: str = "epsilon") -> Path:
    """Writes a diffusers directory: 8x8 images, 4x4x4 latents, 24 q/k/v matrices."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=8,
        scaling_factor=0.5,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(directory / "pipeline")
    return directory / "pipeline"


def save_latents(directory: Path, pipeline: Path, n: int) -> LatentCache:
    """A latent cache of ``n`` random records in two classes."""
    generator = np.random.default_rng(0)
    np.save(directory / "moments.npy", generator.normal(size=(n, 8, 4, 4)).astype(np.float32))
    np.save(directory / "labels.npy", generator.integers(0, 2, n))
    prompts = ("An image of a", "An image of b")
    encode_conditions(load_pipeline(str(pipeline)), prompts).save(directory / CONDITIONS)
    return LatentCache(str(directory))
