"""Architectures of the bundled public models, untrained; torch's global generator seeds them."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sapf_ray.glyphs import CHARACTERS, DIGIT_WORDS

MAX_TOKENS = 16
TEXT_WIDTH = 64

# Byte-pair merges, "_" ending a word, learnt from prompts and class names of public image sets;
# other words become bytes.
# Kept as text because the trainer of `tokenizers` orders ties differently in every process.
MERGES = """
m a e r_ l o a s i n t h a c a n e r e n_ i g o u o lo r e a i a n_ h i l e l e_ o r o n_ b i c
a c h c as c olo d o g y_ i c i t i v i n_ l as l in m o n g_ p er r o s c s e s i t u t er_ ma
n_ ma le_ olo gy_ ai r cas e_ a b a l a r a u a y_ a th b e b l b er_ b lo b ac b re c e c t_ c
k_ c las d e d n d w d ig e s e y_ e d_ e ig e male_ e al f ac f ou f iv f ro f emale_ g r g e_
g re g an_ g las h o h t_ h an h ai h or h eal i s i t_ i ma i th i lin i dn k in_ k gr k idn l
u l l_ l d_ l an l ig l iv m en_ m ic m ber_ m ilin n u n e_ n d_ n o_ n in n an n ig n or o p o
d_ o f_ o mo o man_ o ld_ o ne_ p r p le p ic p per p ath p ho p lan r u r e_ r d_ r it r ay_ s
t s u s e_ s hi s on_ s kin_ s milin s ple t w t e_ t o_ t in t en_ t ter_ t ed_ t is t omo t ru
u pper v en_ w er w hi w it w ith w oman_ x ray_ y ou z er ma l_ ma lig lo wer as t_ in ted_ th
e_ th y_ th re ac k_ ac ter_ an d_ ou t_ ou nd_ re tin hi st le si le tter_ or gan_ bi le_ bi
rd_ ca r_ ca t_ ch ar ch es colo r_ colo n_ do g_ do men_ lin er_ mo r_ per son_ ro sc sc an_ se
s_ se ven_ si x_ tu re_ tu mor_ air plan air liner_ ab domen_ au tomo be nig bl ack_ blo od_ bac
kgr bre ast_ ce ll_ clas s_ de er_ dw rit dig it_ eig ht_ fac e_ fou r_ fiv e_ fro g_ gre y_
glas ses_ han dwrit hai r_ hor se_ heal thy_ ima ge_ kidn ey_ lu ng_ liv er_ mic rosc nu mber_
nin e_ nan t_ nor mal_ op e_ pr inted_ pic ture_ path ology_ pho to_ su e_ shi p_ smilin g_ sple
en_ tw o_ tis sue_ tru ck_ upper case_ whi te_ wit h_ with out_ you ng_ zer o_ malig nant_ lower
case_ thre e_ retin a_ hist ology_ lesi on_ char acter_ ches t_ airplan e_ automo bile_ benig n_
backgr ound_ handwrit ten_ microsc ope_
"""


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's lower-casing byte-level BPE over ``MERGES``; any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts = MERGES.replace("_", "</w>").split()
    merges: list[Any] = list(zip(parts[::2], parts[1::2], strict=True))
    tokens = [
        *alphabet,
        *(f"{c}</w>" for c in alphabet),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def build_pipeline() -> StableDiffusionPipeline:
    """``glyphs-tiny``: everything its own."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            **{
                f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
                for name in ("bos", "eos", "pad")
            },
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    return text_pipeline(
        build_unet((32, 64, 64)), vae, text_encoder=text_encoder, tokenizer=tokenizer
    )


def build_unet(widths: tuple[int, int, int]) -> UNet2DConditionModel:
    """Three one-layer levels (8, 4, 2 latents wide) of 10 transformer blocks.

    Hence 60 q/k/v matrices.

    That takes a third of the time of two-layer levels of the same size.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=4,  # by diffusers' old naming: the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def text_pipeline(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    *,
    text_encoder: Any,
    tokenizer: Any,
) -> StableDiffusionPipeline:
    """The parts as a pipeline with the scheduler that all bundled models share."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",  # sampling starts at the noisiest step
    )


def build_dit(
    vae: AutoencoderKL,
    width: int,
    *,
    layers: int,
) -> DiTPipeline:
    """A diffusion transformer over 16 patches of 2 x 2 latents.

    It is conditioned on one of 62 labels or on none (label 62).
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=len(CHARACTERS),
    )
    # Every block starts as the identity (Peebles & Xie 2023, section 3.2); diffusers leaves that
    # to the trainer.
    for layer in (
        transformer.proj_out_1,
        transformer.proj_out_2,
        *(b.norm1.linear for b in transformer.transformer_blocks),
    ):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    labels = {str(i): label_names(c) for i, c in enumerate(CHARACTERS)}
    pipe = DiTPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=build_scheduler(),
        id2label=labels,
    )
    pipe.register_to_config(
        id2label=labels
    )  # the pipeline takes it from model_index.json but does not write it there
    return pipe


def label_names(character: str) -> str:
    """All names of a character's label, separated by commas as in ImageNet's list."""
    if character.isdigit():
        word = DIGIT_WORDS[int(character)]
        return f"digit {word}, {word}, {character}"
    return f"{'uppercase' if character.isupper() else 'lowercase'} letter {character}, {character}"
