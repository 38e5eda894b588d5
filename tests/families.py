"""Tiny pipelines with random weights of every further family, made offline: 8 x 8 images, a few ten
thousand parameters, tokenizers of a hundred words.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from jobs.made_up_tokenizers import word_tokenizer
from tests.tiny import WORDS, tiny_tokenizer

SIDE = 4  # of the latents; images have twice as many pixels


def words_alone() -> Any:
    """One token a word or letter."""
    return word_tokenizer([*WORDS, *"abcdefghijklmnopqrstuvwxyz"])


def clip(projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=100, d_model=32, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def vae(channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=2 * SIDE,
        scaling_factor=0.5,
        shift_factor=shift,
    )


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(projected=False),
        text_encoder_2=clip(projected=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=_ddpm(),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """SD3.5's: normalised queries and keys, one layer with a second attention."""
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift=0.06),
        text_encoder=clip(projected=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=words_alone(),
    )


def flux(guidance: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance,
    )
    transformer.register_to_config(sample_size=SIDE)  # as model.resolution would
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0),
        vae=vae(4, shift=0.06),
        text_encoder=clip(projected=False),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=words_alone(),
        transformer=transformer,
    )
    pipe.default_sample_size = SIDE
    return pipe


def flux_schnell() -> FluxPipeline:
    """Without distilled guidance."""
    return flux(guidance=False)


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=words_alone(),
        text_encoder=t5(),
        vae=vae(4),
        transformer=transformer,
        scheduler=_ddpm(),
    )


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=SIDE,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    gemma = Gemma2Model(
        Gemma2Config(
            head_dim=8,
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=100,
            attn_implementation="eager",
        )
    )
    return SanaPipeline(
        tokenizer=words_alone(),
        text_encoder=gemma,
        vae=autoencoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _ddpm() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


FURTHER: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux_schnell": flux_schnell,
    "pixart": pixart,
    "sana": sana,
}


def tiny_family(name: str) -> Any:
    """A pipeline of the family, its random weights always the same, in evaluation mode."""
    torch.manual_seed(0)
    pipe = FURTHER[name]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def save_family(name: str, directory: Path) -> Path:
    """Writes it as a diffusers directory."""
    tiny_family(name).save_pretrained(directory)
    return directory
