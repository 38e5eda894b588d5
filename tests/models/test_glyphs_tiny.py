"""The shipped public models: stock diffusers loads them, they are small, and they work."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import safe_open

from jobs import pretrain_public
from jobs.pretraining.architectures import build_pipeline
from jobs.pretraining.training import to_rgb
from sapf_ray.errors import DataError
from sapf_ray.glyphs import CHARACTERS, PRETRAIN_FONTS, GlyphCorpus, prompt_for
from sapf_ray.models.glyph_features import BUNDLED_FEATURES, FEATURE_DIM, load_glyph_features
from sapf_ray.models.location import BUNDLED_DIR

TINY = BUNDLED_DIR / "glyphs-tiny"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def fresh_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """RGB float images in [0, 1] and labels 0..9 that no training run drew."""
    corpus = GlyphCorpus(PRETRAIN_FONTS, CHARACTERS)
    images, labels = corpus.render(
        300, torch.Generator().manual_seed(777), classes=torch.arange(300) % 10
    )
    return to_rgb(images), labels


def test_bundle_is_small_and_half_precision():
    files = [
        path for path in BUNDLED_DIR.rglob("*") if path.is_file() and not path.is_symlink()
    ]  # links share parts
    assert sum(path.stat().st_size for path in files) < 9 * 2**20
    for path in BUNDLED_DIR.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            names = weights.keys()
            assert {str(weights.get_slice(n).get_dtype()) for n in names} <= {"F16", "I64"}, path


def test_loads_as_a_stock_pipeline_in_float32(pipe):
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_architecture(pipe):
    assert 1.5e6 < sum(p.numel() for p in pipe.unet.parameters()) < 1.8e6
    assert sum(p.numel() for p in pipe.vae.parameters()) < 5e5
    projections = [n for n, _ in pipe.unet.named_modules() if n.endswith(("to_q", "to_k", "to_v"))]
    assert len(projections) == 60
    assert {n.split("_block")[0] for n in projections} == {"down", "mid", "up"}


def test_latents_are_8_by_8_of_unit_scale(pipe, fresh_digits):
    images, _ = fresh_digits
    with torch.no_grad():
        latents = pipe.vae.encode(2 * images - 1).latent_dist.mode()
        decoded = pipe.vae.decode(latents).sample / 2 + 0.5
    assert latents.shape[1:] == (4, 8, 8)
    assert float(latents.std() * pipe.vae.config.scaling_factor) == pytest.approx(1, abs=0.15)
    assert float((decoded - images).abs().mean()) < 0.02


def test_tokenizer_knows_the_prompts_and_any_other_text(pipe):
    ids = pipe.tokenizer([prompt_for(c) for c in CHARACTERS], padding="max_length").input_ids
    assert len({tuple(row) for row in ids}) == 36 + 26  # case is a word: "uppercase", "lowercase"
    assert {len(row) for row in ids} == {pipe.tokenizer.model_max_length} == {16}
    odd = pipe.tokenizer("zebra 日本", truncation=True).input_ids
    assert pipe.tokenizer.decode(odd, skip_special_tokens=True) == "zebra 日本"


def test_job_builds_the_shipped_tokenizer_and_architecture(pipe):
    built = build_pipeline()
    assert built.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    prompts = [*map(prompt_for, CHARACTERS), "", "zebra 日本"]
    assert built.tokenizer(prompts).input_ids == pipe.tokenizer(prompts).input_ids
    for part in ("unet", "vae", "text_encoder"):
        shapes = {n: w.shape for n, w in getattr(built, part).state_dict().items()}
        assert shapes == {n: w.shape for n, w in getattr(pipe, part).state_dict().items()}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generated_digits_are_read_as_asked(pipe, guidance):
    sampler = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sampler.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sampler.set_progress_bar_config(disable=True)
    labels = torch.arange(60) % 10
    images = sampler(
        [prompt_for(str(int(d))) for d in labels],
        num_inference_steps=20,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert images.shape == (60, 3, 32, 32)
    read = load_glyph_features()(images)[:, :10].argmax(1)
    assert float((read == labels).float().mean()) > 0.8


def test_features_recognise_fresh_glyphs(fresh_digits):
    images, labels = fresh_digits
    net = load_glyph_features()
    assert not net.training
    assert float((net(images)[:, :10].argmax(1) == labels).float().mean()) > 0.9
    assert net.features(images).shape == (300, FEATURE_DIM)


def test_features_depend_on_neither_batch_nor_mode(fresh_digits):
    images = fresh_digits[0][:4]
    net = load_glyph_features()
    together, alone = net.features(images), net.features(images[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.train().features(images), together, atol=1e-4, rtol=1e-4)


def test_missing_and_truncated_features_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_glyph_features(tmp_path)
    shutil.copy(BUNDLED_FEATURES / "model.safetensors", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="not the weights of GlyphFeatures"):
        load_glyph_features(tmp_path)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--images", "5"], "--images 5"),
        (["--steps", "-1"], "--steps -1"),
        (["--seed", "-1"], "--seed"),
        (["--models", "letters-tiny"], "shares parts of glyphs-tiny"),
    ],
)
def test_job_names_bad_arguments(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain_public.main(["--out", str(tmp_path), *flags])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err
