"""Writes pipelines of the published architectures with random weights: full width, real configs.

    python -m jobs.random_models --out /tmp/random --models sd-v1-5 --dtype bfloat16
    python -m jobs.random_models --out /tmp/random          # all rows: about 30 GB in bfloat16

For measuring and testing at full size where nothing can be fetched: memory, time and shapes are
those of the published weights, images are noise. Nothing here reads the network; configs are those
of the published repositories, tokenizers are made up, of the published size.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from jobs.made_up_tokenizers import MAX_TOKENS, VOCABULARY, clip_tokenizer, word_tokenizer
from jobs.published_families import (
    CLIP_BIG_G,
    DC_AE_F32,
    FLUX_1_DEV,
    FLUX_VAE,
    GEMMA_2_2B,
    PIXART_SIGMA,
    SANA_1600M,
    SD3_5_MEDIUM,
    SD3_VAE,
    SDXL_UNET,
    T5_XXL,
)
from sapf_ray.files import write_json

SEED = 0

UNET_1_5: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2_1_BASE: Mapping[str, Any] = {
    **UNET_1_5,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "upcast_attention": False,
}
DIT_XL_2: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
CLIP_L: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OPEN_CLIP_H: Mapping[str, Any] = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SD_NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


SD_EULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PIXART_NOISE: Mapping[str, Any] = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
SANA_FLOW: Mapping[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of a pipeline.

    Attributes:
        library: ``diffusers`` or ``transformers``.
        kind: Name of its class there.
        config: Its published config.
    """

    library: str
    kind: str
    config: Mapping[str, Any]

    def build(self) -> Any:
        """The component with random weights, in torch's default dtype."""
        if self.kind in TOKENIZERS:
            return TOKENIZERS[self.kind]()
        cls = getattr(diffusers if self.library == "diffusers" else transformers, self.kind)
        if self.library == "diffusers":
            return cls.from_config(dict(self.config))
        return cls(cls.config_class(**self.config))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pipeline.

    Attributes:
        pipeline: Class of the pipeline in diffusers.
        parts: Folder → component.
        index: What model_index.json holds beside them.
    """

    pipeline: str
    parts: Mapping[str, Part]
    index: Mapping[str, Any] = field(default_factory=dict)


def _stable_diffusion(
    unet: Mapping[str, Any], text: Mapping[str, Any], scheduler: str, **noise: Any
) -> Row:
    parts = {
        "unet": Part(library="diffusers", kind="UNet2DConditionModel", config=unet),
        "vae": Part(library="diffusers", kind="AutoencoderKL", config=VAE),
        "text_encoder": Part(library="transformers", kind="CLIPTextModel", config=text),
        "tokenizer": Part(library="transformers", kind="CLIPTokenizer", config={}),
        "scheduler": Part(library="diffusers", kind=scheduler, config={**SD_NOISE, **noise}),
    }
    index = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return Row(
        pipeline="StableDiffusionPipeline",
        parts=parts,
        index={**index, "requires_safety_checker": False},
    )


def _diffusers(kind: str, config: Mapping[str, Any]) -> Part:
    return Part(library="diffusers", kind=kind, config=config)


def _transformers(kind: str, config: Mapping[str, Any] | None = None) -> Part:
    return Part(library="transformers", kind=kind, config=config or {})


def _further() -> dict[str, Row]:
    """Rows of further families."""
    two_clips = {
        "tokenizer": _transformers("CLIPTokenizer"),
        "text_encoder_2": _transformers("CLIPTextModelWithProjection", {**CLIP_L, **CLIP_BIG_G}),
        "tokenizer_2": _transformers("CLIPTokenizer"),
    }
    t5 = _transformers("T5EncoderModel", T5_XXL)
    words = _transformers("PreTrainedTokenizerFast")
    sdxl = {
        "unet": _diffusers("UNet2DConditionModel", SDXL_UNET),
        "vae": _diffusers("AutoencoderKL", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": _transformers("CLIPTextModel", CLIP_L),
        **two_clips,
        "scheduler": _diffusers("EulerDiscreteScheduler", SD_EULER),
    }
    sd3 = {
        "transformer": _diffusers("SD3Transformer2DModel", SD3_5_MEDIUM),
        "vae": _diffusers("AutoencoderKL", {**VAE, **SD3_VAE}),
        "text_encoder": _transformers("CLIPTextModelWithProjection", CLIP_L),
        **two_clips,
        "text_encoder_3": t5,
        "tokenizer_3": words,
        "scheduler": _diffusers("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
    flow = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    flux = {
        "transformer": _diffusers("FluxTransformer2DModel", FLUX_1_DEV),
        "vae": _diffusers("AutoencoderKL", {**VAE, **FLUX_VAE}),
        "text_encoder": _transformers("CLIPTextModel", CLIP_L),
        "tokenizer": _transformers("CLIPTokenizer"),
        "text_encoder_2": t5,
        "tokenizer_2": words,
        "scheduler": _diffusers("FlowMatchEulerDiscreteScheduler", flow),
    }
    pixart = {
        "transformer": _diffusers("PixArtTransformer2DModel", PIXART_SIGMA),
        "vae": _diffusers("AutoencoderKL", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": t5,
        "tokenizer": words,
        "scheduler": _diffusers("DPMSolverMultistepScheduler", PIXART_NOISE),
    }
    sana = {
        "transformer": _diffusers("SanaTransformer2DModel", SANA_1600M),
        "vae": _diffusers("AutoencoderDC", DC_AE_F32),
        "text_encoder": _transformers("Gemma2Model", GEMMA_2_2B),
        "tokenizer": words,
        "scheduler": _diffusers("DPMSolverMultistepScheduler", SANA_FLOW),
    }
    unused = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    return {
        "sdxl-base": Row(
            pipeline="StableDiffusionXLPipeline",
            parts=sdxl,
            index={**unused, "force_zeros_for_empty_prompt": True},
        ),
        "sd-3-5-medium": Row(pipeline="StableDiffusion3Pipeline", parts=sd3, index=unused),
        "flux-1-dev": Row(pipeline="FluxPipeline", parts=flux, index=unused),
        "pixart-sigma-1024": Row(pipeline="PixArtSigmaPipeline", parts=pixart),
        "sana-1600m-1024": Row(pipeline="SanaPipeline", parts=sana),
    }


ROWS: dict[str, Row] = {
    "sd-v1-5": _stable_diffusion(UNET_1_5, CLIP_L, "PNDMScheduler", skip_prk_steps=True),
    "sd-2-1-base": _stable_diffusion(
        UNET_2_1_BASE,
        OPEN_CLIP_H,
        "PNDMScheduler",
        skip_prk_steps=True,
        prediction_type="epsilon",
    ),
    "sd-2-1-v": _stable_diffusion(
        {**UNET_2_1_BASE, "sample_size": 96, "upcast_attention": True},
        OPEN_CLIP_H,
        "DDIMScheduler",
        clip_sample=False,
        prediction_type="v_prediction",
    ),
    "dit-xl-2-256": Row(
        pipeline="DiTPipeline",
        parts={
            "transformer": Part(library="diffusers", kind="DiTTransformer2DModel", config=DIT_XL_2),
            "vae": Part(
                library="diffusers", kind="AutoencoderKL", config={**VAE, "sample_size": 256}
            ),
            "scheduler": Part(
                library="diffusers",
                kind="DDIMScheduler",
                config={"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False},
            ),
        },
        index={"id2label": {str(number): f"label {number}" for number in range(1000)}},
    ),
    **_further(),
}
"""Name of the folder → pipeline; the names are those of ``sapf models`` where it has one."""


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": clip_tokenizer,
    "PreTrainedTokenizerFast": word_tokenizer,
}


def write(row: Row, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes a pipeline; one component at a time is in memory.

    Args:
        row: The pipeline.
        folder: Its directory; created.
        dtype: Precision of the weights.
    """
    torch.manual_seed(SEED)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for name, part in row.parts.items():
            part.build().save_pretrained(folder / name)
            gc.collect()
    finally:
        torch.set_default_dtype(usual)
    listed = {name: [part.library, part.kind] for name, part in row.parts.items()}
    about = {"_class_name": row.pipeline, "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", {**about, **listed, **row.index})


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipelines")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(ROWS), default=list(ROWS), help="default: all"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="bfloat16",
        help="precision on disk: 2.1 GB of sd-v1-5 in 16 bits, 4.3 GB in float32",
    )
    options = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for name in options.models:
        began = time.perf_counter()
        folder = options.out / name
        write(ROWS[name], folder, dtype=getattr(torch, options.dtype))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
