"""Train the embedded public models on rendered glyphs, from nothing, on a laptop.

    python -m jobs.pretrain_public --out sapf_ray/models/bundled --seed 0 --threads 1

writes ``glyphs-tiny/`` (a diffusers ``StableDiffusionPipeline``) and ``glyph-features/`` (the classifier behind
``fid_glyph``), each with a model card. Public data only: no privacy is spent.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sapf_ray.data.glyphs import CHARACTERS, PRETRAIN_FONTS, GlyphCorpus, prompt_for
from sapf_ray.models.glyph_features import WEIGHTS_NAME, GlyphFeatures

log = logging.getLogger("pretrain_public")

MAX_TOKENS, TEXT_WIDTH = 16, 64
DIGIT_SHARE = 0.5  # of the training images; digits are what the default run generates
UNCONDITIONAL_SHARE = 0.1  # prompts replaced by "", which is what guidance subtracts

# Byte-pair merges, "_" ending a word, learnt from prompts and class names of public image sets; other words become bytes.
# Kept as text because the trainer of `tokenizers` orders ties differently in every process.
MERGES = """m a e r_ l o a s i n t h a c a n e r e n_ i g o u o lo r e a i a n_ h i l e l e_ o r o n_ b i c a c h c as c olo d
o g y_ i c i t i v i n_ l as l in m o n g_ p er r o s c s e s i t u t er_ ma n_ ma le_ olo gy_ ai r cas e_ a b a l a r a u a
y_ a th b e b l b er_ b lo b ac b re c e c t_ c k_ c las d e d n d w d ig e s e y_ e d_ e ig e male_ e al f ac f ou f iv f ro
f emale_ g r g e_ g re g an_ g las h o h t_ h an h ai h or h eal i s i t_ i ma i th i lin i dn k in_ k gr k idn l u l l_ l d_
l an l ig l iv m en_ m ic m ber_ m ilin n u n e_ n d_ n o_ n in n an n ig n or o p o d_ o f_ o mo o man_ o ld_ o ne_ p r p le
p ic p per p ath p ho p lan r u r e_ r d_ r it r ay_ s t s u s e_ s hi s on_ s kin_ s milin s ple t w t e_ t o_ t in t en_ t
ter_ t ed_ t is t omo t ru u pper v en_ w er w hi w it w ith w oman_ x ray_ y ou z er ma l_ ma lig lo wer as t_ in ted_ th e_
th y_ th re ac k_ ac ter_ an d_ ou t_ ou nd_ re tin hi st le si le tter_ or gan_ bi le_ bi rd_ ca r_ ca t_ ch ar ch es colo r_
colo n_ do g_ do men_ lin er_ mo r_ per son_ ro sc sc an_ se s_ se ven_ si x_ tu re_ tu mor_ air plan air liner_ ab domen_ au
tomo be nig bl ack_ blo od_ bac kgr bre ast_ ce ll_ clas s_ de er_ dw rit dig it_ eig ht_ fac e_ fou r_ fiv e_ fro g_ gre y_
glas ses_ han dwrit hai r_ hor se_ heal thy_ ima ge_ kidn ey_ lu ng_ liv er_ mic rosc nu mber_ nin e_ nan t_ nor mal_ op e_ pr
inted_ pic ture_ path ology_ pho to_ su e_ shi p_ smilin g_ sple en_ tw o_ tis sue_ tru ck_ upper case_ whi te_ wit h_ with
out_ you ng_ zer o_ malig nant_ lower case_ thre e_ retin a_ hist ology_ lesi on_ char acter_ ches t_ airplan e_ automo bile_
benig n_ backgr ound_ handwrit ten_ microsc ope_"""
LIMITS = "Use guidance 2: at 1 noticeably more digits are misread (rates below)."


@dataclass
class Trace:
    """The randomness of a run and what its model cards tell about each stage."""

    generator: torch.Generator
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # images per second

    def facts(self, *stages: str) -> dict[str, object]:
        return {
            f"{s}: last loss, seconds, images/s": f"{self.losses[s]:.4f}, {self.seconds[s]:.0f}, {self.rates[s]:.0f}"
            for s in stages
        }


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's lower-casing byte-level BPE over ``MERGES``; any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts = MERGES.replace("_", "</w>").split()
    merges: list[Any] = list(zip(parts[::2], parts[1::2], strict=True))
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_pipeline() -> StableDiffusionPipeline:
    """An untrained pipeline of the shipped architecture; torch's global generator seeds it."""
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
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
    )
    # Three one-layer levels (8, 4, 2 latents wide) give 10 transformer blocks, hence 60 q/k/v
    # matrices, at a third of the time that two-layer levels of the same size take.
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        attention_head_dim=4,  # by diffusers' old naming: the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
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
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",  # sampling starts at the noisiest step
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw_labels(n: int, generator: torch.Generator) -> torch.Tensor:
    """``n`` labels, a share ``DIGIT_SHARE`` of them digits (the first ten of ``CHARACTERS``)."""
    digits = torch.randint(10, (n,), generator=generator)
    letters = torch.randint(10, len(CHARACTERS), (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < DIGIT_SHARE, digits, letters)


def to_rgb(gray: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 1, h, w) -> float (n, 3, h, w) in [0, 1]."""
    return (gray.float() / 255).expand(-1, 3, -1, -1)


def fit(
    name: str, parameters: list[nn.Parameter], loss_of_batch: Callable[[], torch.Tensor], trace: Trace,
    lr: float, steps: int, batch: int, after_step: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """AdamW with clipped gradients, a linear warm-up and a cosine to zero; logs and fills ``trace``."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            trace.losses[name] = sum(losses[-100:]) / len(losses[-100:])
            trace.rates[name] = step * batch / (time.perf_counter() - start)
            log.info("%s step %d/%d loss %.4f, %.0f images/s", name, step, steps, trace.losses[name], trace.rates[name])
    trace.seconds[name] = time.perf_counter() - start


def train_features(
    net: GlyphFeatures, images: torch.Tensor, labels: torch.Tensor, steps: int, trace: Trace, batch: int = 128
) -> None:
    def loss_of_batch() -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=trace.generator)
        return F.cross_entropy(net(to_rgb(images[rows])), labels[rows])

    fit("features", list(net.parameters()), loss_of_batch, trace, lr=3e-3, steps=steps, batch=batch)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, trace: Trace, batch: int = 64) -> None:
    def loss_of_batch() -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=trace.generator)
        x = 2 * to_rgb(images[rows]) - 1
        mean, log_var = encode(vae, x)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=trace.generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(z).sample
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        # 1e-3 balances the two as a Laplace likelihood of scale about 0.01 would.
        return (decoded.float() - x).abs().mean() + 1e-3 * kl

    fit("vae", list(vae.parameters()), loss_of_batch, trace, lr=1.5e-3, steps=steps, batch=batch)


def encode(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 32, 32) in [-1, 1] -> posterior mean and log variance, (n, 4, 8, 8) each."""
    # bfloat16 is 1.4 times faster here; it is slower for the U-Net's smaller layers.
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = vae.encode(x).latent_dist.parameters.float().chunk(2, dim=1)
    return mean, log_var.clamp(-30, 20)


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, images: torch.Tensor, trace: Trace) -> torch.Tensor:
    """Latents float32 (n, 4, 8, 8) of unit standard deviation; sets the VAE's scaling factor."""
    start, parts = time.perf_counter(), []
    for part in images.split(512):
        mean, log_var = encode(vae, 2 * to_rgb(part) - 1)
        parts.append(mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=trace.generator))
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    trace.seconds["latents"] = time.perf_counter() - start
    log.info("%d latents, factor %.4f, %.0f s", len(latents), vae.config.scaling_factor, trace.seconds["latents"])
    return latents.mul_(vae.config.scaling_factor)


def train_unet(
    pipe: StableDiffusionPipeline, latents: torch.Tensor, labels: torch.Tensor, steps: int, trace: Trace, batch: int = 96
) -> None:
    """Trains U-Net and text encoder together; leaves their moving average in ``pipe``."""
    generator = trace.generator
    prompts = [*map(prompt_for, CHARACTERS), ""]
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    trained = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder}).train()
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    last = pipe.scheduler.config.num_train_timesteps

    def loss_of_batch() -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        prompt = labels[rows].clone()
        prompt[torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE] = len(prompts) - 1
        # Stratified time steps: the same expectation as independent ones, with less variance.
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) * (last / batch)
        t = t.long().clamp_max(last - 1)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = pipe.scheduler.add_noise(latents[rows], noise, t)
        text = pipe.text_encoder(tokens)[0][prompt]  # there are only 63 prompts
        return F.mse_loss(pipe.unet(noisy, t, text).sample, noise)

    fit("unet", list(trained.parameters()), loss_of_batch, trace, lr=1e-3, steps=steps, batch=batch,
        after_step=lambda: average.update_parameters(trained))  # fmt: skip
    trained.load_state_dict(average.module.state_dict())
    trained.eval()


@torch.no_grad()
def recognition(pipe: StableDiffusionPipeline, net: GlyphFeatures, seed: int, per_digit: int = 20) -> dict[str, float]:
    """Share of generated digits that the classifier, choosing among digits, reads as asked."""
    sampler = copy.copy(pipe)
    sampler.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sampler.set_progress_bar_config(disable=True)
    labels = torch.arange(10).repeat_interleave(per_digit)
    rates = {}
    for guidance in (1.0, 2.0):
        images = sampler(
            [prompt_for(str(int(d))) for d in labels],
            num_inference_steps=20,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        read = net.eval()(images.float())[:, :10].argmax(1)
        rates[f"guidance {guidance:g}"] = round(float((read == labels).float().mean()), 3)
    log.info("recognised as the asked digit: %s", rates)
    return rates


def held_out_accuracy(net: GlyphFeatures, corpus: GlyphCorpus, seed: int) -> dict[str, float]:
    """On fresh glyphs: among all 62 classes (c/C/0/O/o overlap), and among digits for digits."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = corpus.render(4000, generator, draw_labels(4000, generator))
    with torch.no_grad():
        logits = torch.cat([net.eval()(to_rgb(part)) for part in images.split(500)])
    digits = labels < 10
    return {
        "62 classes": round(float((logits.argmax(1) == labels).float().mean()), 3),
        "digits": round(float((logits[digits, :10].argmax(1) == labels[digits]).float().mean()), 3),
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def card(title: str, about: str, command: str, facts: dict[str, object]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"# {title}\n\n{about}\n\nMade by\n\n    {command}\n\nin the repository root; "
        f"the same command trains it again; equality to the last bit is not promised.\n\n| | |\n|---|---|\n{rows}\n"
    )


def save_pipeline(pipe: StableDiffusionPipeline, directory: Path) -> None:
    """Writes fp16 weights; a stock ``from_pretrained`` brings them up as float32."""
    copy.deepcopy(pipe).to(dtype=torch.float16).save_pretrained(directory)
    # transformers 5 loads a model in the type its config names, diffusers in float32: agree.
    config = directory / "text_encoder" / "config.json"
    text_config = json.loads(config.read_text())
    text_config["dtype"] = "float32"
    config.write_text(json.dumps(text_config, indent=2, sort_keys=True) + "\n")


def save_features(net: GlyphFeatures, directory: Path) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}, directory / WEIGHTS_NAME)


def publish(save: Callable[[Path], None], directory: Path, readme: str) -> None:
    """Puts a complete model in place of an older one, never a half-written one."""
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save(fresh)
    (fresh / "README.md").write_text(readme)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600; these are public
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.pretrain_public", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write both models to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=150_000, help="rendered training images")
    parser.add_argument("--feature-steps", type=int, default=1200, help="of 128 images")
    parser.add_argument("--vae-steps", type=int, default=1100, help="of 64 images")
    parser.add_argument("--unet-steps", type=int, default=3600, help="of 96 images")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    args = parser.parse_args(argv)
    for flag, least in {"images": 1000, "feature-steps": 1, "vae-steps": 1, "unet-steps": 1, "threads": 1, "seed": 0}.items():
        if (value := getattr(args, flag.replace("-", "_"))) < least:
            parser.error(f"--{flag} {value}: must be at least {least}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: exists and is not a directory")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    start, trace = time.perf_counter(), Trace(torch.Generator().manual_seed(args.seed))

    corpus = GlyphCorpus(PRETRAIN_FONTS, CHARACTERS, args.seed)
    images, labels = corpus.render(args.images, trace.generator, draw_labels(args.images, trace.generator))
    log.info("%d images of corpus %s, %.0f s", len(images), corpus.corpus_hash()[:12], time.perf_counter() - start)
    pipe, net = build_pipeline(), GlyphFeatures()
    train_features(net, images, labels, args.feature_steps, trace)
    accuracy = held_out_accuracy(net, corpus, args.seed + 1)
    log.info("classifier on fresh glyphs: %s", accuracy)
    train_vae(pipe.vae, images, args.vae_steps, trace)
    latents = encode_corpus(pipe.vae.eval(), images, trace)
    train_unet(pipe, latents, labels, args.unet_steps, trace)
    recognised = recognition(pipe, net, args.seed)

    command = "python -m jobs.pretrain_public " + " ".join(sys.argv[1:] if argv is None else argv)
    shared: dict[str, object] = {
        "seed": args.seed,
        "data": f"{args.images} rendered glyphs, {DIGIT_SHARE:.0%} of them digits; no sensitive image",
        "corpus hash": f"`{corpus.corpus_hash()}`",
        "fonts": ", ".join(PRETRAIN_FONTS) + " (matplotlib)",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}",
    }

    about = "A tiny Stable Diffusion pipeline that draws single characters of 32 x 32 pixels. " + LIMITS
    facts = shared | trace.facts("vae", "unet")
    facts["parameters"] = f"U-Net {count(pipe.unet):,}, VAE {count(pipe.vae):,}, text encoder {count(pipe.text_encoder):,}"
    projections = [name for name, _ in pipe.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v"))]
    facts["q, k, v matrices of the U-Net"] = len(projections)
    facts["digits recognised as asked (DPM-Solver++, 20 steps)"] = recognised
    facts["seconds in all"] = round(time.perf_counter() - start)
    publish(partial(save_pipeline, pipe), args.out / "glyphs-tiny", card("glyphs-tiny", about, command, facts))
    about = "A classifier of 62 characters; its 96 penultimate features serve `fid_glyph`."
    facts = shared | trace.facts("features") | {"parameters": f"{count(net):,}", "accuracy on fresh glyphs": accuracy}
    publish(partial(save_features, net), args.out / "glyph-features", card("glyph-features", about, command, facts))
    log.info("wrote %s, %.0f s in all", args.out, time.perf_counter() - start)


if __name__ == "__main__":
    main()
