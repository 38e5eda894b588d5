"""Train the bundled public models on rendered glyphs, from nothing, on a laptop.

    python -m jobs.pretrain_public --out sapf_ray/models/bundled --seed 0 --threads 1
    python -m jobs.pretrain_public --out sapf_ray/models/bundled --models letters-tiny

Each row of ``MODELS`` becomes a diffusers directory with a model card; ``glyphs-tiny`` also trains
the VAE and text encoder that the others share, and ``glyph-features/``, the classifier behind
``fid_glyph``. Public data only: no privacy is spent.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from jobs.pretraining.architectures import build_dit, build_pipeline, build_unet, text_pipeline
from jobs.pretraining.publishing import card, count, publish, save_features, save_pipeline
from jobs.pretraining.recognition import accuracy_of, recognition
from jobs.pretraining.training import (
    Trace,
    draw_labels,
    encode_corpus,
    to_rgb,
    train_denoiser,
    train_features,
    train_vae,
)
from sapf_ray.glyphs import CHARACTERS, PRETRAIN_FONTS, GlyphCorpus, prompt_for
from sapf_ray.models.conditioning import denoiser_of, has_labels
from sapf_ray.models.glyph_features import GlyphFeatures, load_glyph_features

log = logging.getLogger("pretrain_public")

DONOR = "glyphs-tiny"
FEATURES = "glyph-features"
BATCH = 96  # images per step of a denoiser
_SERIF_FAMILIES = ("DejaVuSerif", "STIX", "cmb", "cmr")
SERIFS = tuple(font for font in PRETRAIN_FONTS if font.startswith(_SERIF_FAMILIES))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained.

    Attributes:
        about: First lines of the model card.
        build: Directory of the models trained before -> pipeline with an untrained denoiser.
        steps: Number of steps of ``BATCH`` images.
        digit_share: Share of the training images that are digits.
        fonts: Fonts of the training images.
        shared: Parts taken from ``glyphs-tiny`` as they are.
    """

    about: str
    build: Callable[[Path], Any]
    steps: int
    digit_share: float = 0.5  # digits are what the default run generates
    fonts: tuple[str, ...] = PRETRAIN_FONTS
    shared: tuple[str, ...] = ()


def _frozen(model: nn.Module) -> Any:
    return model.requires_grad_(False).eval()


def _vae(out: Path) -> AutoencoderKL:
    return _frozen(AutoencoderKL.from_pretrained(out / DONOR / "vae"))


def _letters(out: Path) -> Any:
    text_encoder = CLIPTextModel.from_pretrained(out / DONOR / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(out / DONOR / "tokenizer")
    return text_pipeline(
        build_unet((24, 40, 40)),
        _vae(out),
        text_encoder=_frozen(text_encoder),
        tokenizer=tokenizer,
    )


MODELS: dict[str, Recipe] = {
    DONOR: Recipe(
        about="A tiny Stable Diffusion pipeline that draws single characters of 32 x 32 pixels. "
        "Use guidance 2: at 1 noticeably more digits are misread (rates below).",
        build=lambda _: build_pipeline(),
        steps=3600,
    ),
    "letters-tiny": Recipe(
        about="A tiny Stable Diffusion pipeline that learnt letters in serif fonts and next to no "
        "digits: another prior than glyphs-tiny, whose VAE, text encoder and tokenizer it shares "
        "(as links).",
        build=_letters,
        steps=2000,
        digit_share=0.03,
        fonts=SERIFS,
        shared=("vae", "text_encoder", "tokenizer"),
    ),
    "glyphs-dit-tiny": Recipe(
        about="A tiny class-conditional diffusion transformer (diffusers `DiTPipeline`) over the "
        "62 characters, with the VAE of glyphs-tiny (a link). Label 62 means no label, which is "
        "what guidance subtracts; the stock pipeline writes 1000 for it whatever the model, so "
        "call it with guidance 1.",
        build=lambda out: build_dit(_vae(out), width=64, layers=6),
        steps=6000,
        shared=("vae",),
    ),
}

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def trained_part(pipe: Any, shared: tuple[str, ...]) -> tuple[nn.Module, Predict]:
    """What is trained, and how it predicts noise from (noisy latents, timesteps, labels)."""
    if has_labels(pipe):
        return pipe.transformer, lambda noisy, t, label: pipe.transformer(noisy, t, label).sample
    prompts = [*map(prompt_for, CHARACTERS), ""]
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    if "text_encoder" in shared:
        with torch.no_grad():
            states = pipe.text_encoder(tokens)[0]
        return pipe.unet, lambda noisy, t, label: pipe.unet(noisy, t, states[label]).sample

    def predict(
        noisy: Tensor,
        t: Tensor,
        label: Tensor,
    ) -> Tensor:
        # there are only 63 prompts: all are encoded at every step
        states = pipe.text_encoder(tokens)[0]
        return pipe.unet(noisy, t, states[label]).sample

    trained = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    return trained, predict


def held_out_accuracy(
    net: GlyphFeatures,
    corpus: GlyphCorpus,
    *,
    seed: int,
) -> dict[str, float]:
    """On fresh glyphs: among all 62 classes (c/C/0/O/o overlap), and among digits for digits."""
    generator = torch.Generator().manual_seed(seed)
    share = MODELS[DONOR].digit_share
    classes = draw_labels(4000, generator, digit_share=share)
    images, labels = corpus.render(4000, generator, classes=classes)
    with torch.no_grad():
        logits = torch.cat([net.eval()(to_rgb(part)) for part in images.split(500)])
    digits = labels < 10
    return {
        "62 classes": accuracy_of(logits, labels),
        "digits": accuracy_of(logits[digits, :10], labels[digits]),
    }


def pretrain(
    name: str,
    args: argparse.Namespace,
    *,
    command: str,
) -> None:
    """Trains and publishes one row, and the classifier together with ``glyphs-tiny``."""
    start = time.perf_counter()
    row = MODELS[name]
    torch.manual_seed(args.seed)
    trace = Trace(generator=torch.Generator().manual_seed(args.seed))
    corpus = GlyphCorpus(row.fonts, CHARACTERS, seed=args.seed)
    classes = draw_labels(args.images, trace.generator, digit_share=row.digit_share)
    images, labels = corpus.render(args.images, trace.generator, classes=classes)
    seconds = time.perf_counter() - start
    corpus_name = corpus.corpus_hash()[:12]
    log.info("%s: %d images of corpus %s, %.0f s", name, len(images), corpus_name, seconds)
    pipe = row.build(args.out)
    facts = _facts(row, corpus, args=args)
    if row.shared:
        net = load_glyph_features(args.out / FEATURES)
    else:
        net = GlyphFeatures()
        train_features(
            net,
            images,
            labels=labels,
            steps=args.feature_steps,
            trace=trace,
        )
        _publish_features(
            net,
            corpus,
            args=args,
            facts=facts | trace.facts("features"),
            command=command,
        )
        train_vae(pipe.vae, images, steps=args.vae_steps, trace=trace)
    latents = encode_corpus(pipe.vae.eval(), images, trace=trace, set_scale=not row.shared)
    trained, predict = trained_part(pipe, row.shared)
    train_denoiser(
        "denoiser",
        trained,
        predict=predict,
        scheduler=pipe.scheduler,
        latents=latents,
        labels=labels,
        steps=args.steps or row.steps,
        trace=trace,
        batch=BATCH,
    )
    facts |= trace.facts("denoiser")
    if not row.shared:
        facts |= trace.facts("vae")
    facts |= _size_facts(pipe)
    rates = recognition(pipe, net, seed=args.seed)
    facts["digits recognised as requested (DPM-Solver++, 20 steps)"] = rates
    facts["seconds in all"] = round(time.perf_counter() - start)
    save = partial(save_pipeline, pipe, shared=row.shared, donor=DONOR)
    readme = card(name, row.about, command=command, facts=facts)
    publish(save, args.out / name, readme=readme)
    log.info("wrote %s, %.0f s", args.out / name, time.perf_counter() - start)


def _facts(
    row: Recipe,
    corpus: GlyphCorpus,
    *,
    args: argparse.Namespace,
) -> dict[str, object]:
    """What is known before training."""
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "seed": args.seed,
        "data": f"{args.images} rendered glyphs, {row.digit_share:.0%} of them digits; "
        "no sensitive image",
        "corpus hash": f"`{corpus.corpus_hash()}`",
        "fonts": ", ".join(row.fonts) + " (matplotlib)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _size_facts(pipe: Any) -> dict[str, object]:
    """Numbers of parameters and of matrices."""
    denoiser = denoiser_of(pipe)
    modules = {"denoiser": denoiser, "VAE": pipe.vae}
    if not has_labels(pipe):
        modules["text encoder"] = pipe.text_encoder
    sizes = [f"{part} {count(module):,}" for part, module in modules.items()]
    names = [name for name, _ in denoiser.named_modules()]
    matrices = [name for name in names if name.endswith(("to_q", "to_k", "to_v"))]
    return {"parameters": ", ".join(sizes), "q, k, v matrices": len(matrices)}


def _publish_features(
    net: GlyphFeatures,
    corpus: GlyphCorpus,
    *,
    args: argparse.Namespace,
    facts: dict[str, object],
    command: str,
) -> None:
    accuracy = held_out_accuracy(net, corpus, seed=args.seed + 1)
    log.info("classifier on fresh glyphs: %s", accuracy)
    about = "A classifier of 62 characters; its 96 penultimate features serve `fid_glyph`."
    facts = {
        **facts,
        "parameters": f"{count(net):,}",
        "accuracy on fresh glyphs": accuracy,
    }
    readme = card(FEATURES, about, command=command, facts=facts)
    publish(partial(save_features, net), args.out / FEATURES, readme=readme)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m jobs.pretrain_public", description=summary)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="directory of the models, one folder each",
    )
    add(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=list(MODELS),
        help="which rows; all by default",
    )
    add("--seed", type=int, default=0)
    add(
        "--images",
        type=int,
        default=150_000,
        help="number of rendered training images",
    )
    add(
        "--feature-steps",
        type=int,
        default=1200,
        help="number of steps of 128 images",
    )
    add(
        "--vae-steps",
        type=int,
        default=1100,
        help="number of steps of 64 images",
    )
    add(
        "--steps",
        type=int,
        help=f"number of steps of {BATCH} images, of every denoiser; the row's own by default",
    )
    add(
        "--threads",
        type=int,
        default=2,
        help="CPU threads of torch",
    )
    args = parser.parse_args(argv)
    _check_args(parser, args)
    args.models.sort(key=list(MODELS).index)  # glyphs-tiny first: the others build on it
    return args


_LEAST = {
    "images": 1000,
    "feature-steps": 1,
    "vae-steps": 1,
    "steps": 1,
    "threads": 1,
    "seed": 0,
}


def _check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag, least in _LEAST.items():
        value = getattr(args, flag.replace("-", "_"))
        if value is not None and value < least:
            parser.error(f"--{flag} {value}: must be at least {least}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: exists and is not a directory")
    if DONOR not in args.models and not (args.out / DONOR / "model_index.json").exists():
        parser.error(
            f"--models {' '.join(args.models)}: shares parts of {DONOR}, which is not in "
            f"{args.out}; train it as well"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m jobs.pretrain_public", *given])
    for name in args.models:
        pretrain(name, args, command=command)


if __name__ == "__main__":
    main()
