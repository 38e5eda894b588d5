"""``model.resolution``: one number that every stage works at; keys of old runs do not see it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from sapf_ray.config import ModelConfig, RunConfig, SynthesisConfig, from_dict, result_keys
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.arithmetic import forward_gflop
from sapf_ray.evolution.api import DiffusionApi
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.device import conv_format
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vocabulary import ships_candidates
from sapf_ray.pipeline import run
from sapf_ray.runs.directory import changed_keys
from sapf_ray.saliency.synflow import ones
from sapf_ray.synthesis.recipe import Recipe
from sapf_ray.synthesis.sampler import sample_images
from sapf_ray.synthesis.writer import read_synthetic
from tests.whole_run import BARE, ONE_CORE, command, finish

PROMPTS = ("An image of the digit one", "An image of the digit two")

EVOLVED = (
    "--evolution.enabled=true",
    "--finetune.steps=0",
    "--evolution.iterations=1",
    "--evolution.population=3",
)


@pytest.fixture(scope="module")
def dit(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 4 x 4 in patches of 2, for images of 8 pixels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=4,
    )
    directory = tmp_path_factory.mktemp("dit")
    vae = load_pipeline(str(tiny_pipeline)).vae
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(directory)
    return directory


def opened(path: Path | str, resolution: int | None = None) -> PublicModel:
    return PublicModel.open(ModelConfig(path=str(path), resolution=resolution))


@pytest.mark.parametrize("side", [2, 6, 12, 20])
def test_a_unet_samples_and_evolves_at_any_multiple_of_the_vaes_factor(tiny_pipeline, side):
    model = opened(tiny_pipeline, side)
    assert (model.native_resolution, model.resolution) == (8, side)
    pipe = load_pipeline(model.config)
    assert resolution_of(pipe) == side and resolution_of(load_pipeline(str(tiny_pipeline))) == 8
    _, (latents, *_) = ones(denoiser_of(pipe))
    assert latents.shape[-2:] == (side // 2, side // 2)
    conditions = encode_conditions(pipe, PROMPTS)
    made = sample_images(
        pipe,
        conditions,
        null=null_condition(pipe),
        seeds=[1, 2],
        steps=2,
        guidance_scale=2.0,
    )
    assert made.shape == (2, side, side, 3)
    api = DiffusionApi(model=model.config, prompts=PROMPTS, steps=2, guidance_scale=1.0)
    labels, seeds = np.array([0, 1]), np.array([3, 4])
    fresh = api.random(labels, seeds)
    assert api.vary(fresh, labels, seeds, 0.5).shape == fresh.shape == made.shape


def test_sampling_at_another_size_than_trained_is_still_a_choice_of_its_own(tiny_pipeline):
    config = ModelConfig(path=str(tiny_pipeline), resolution=12)
    pipe = load_pipeline(config)
    again = load_pipeline(str(tiny_pipeline))
    images = [
        sample_images(
            which,
            encode_conditions(which, PROMPTS),
            null=null_condition(which),
            seeds=[1, 2],
            steps=2,
            guidance_scale=1.0,
            resolution=16,
        )
        for which in (pipe, again)
    ]
    assert images[0].shape == (2, 16, 16, 3) and np.array_equal(*images)


def test_a_dit_interpolates_its_positions_from_the_grid_it_was_made_for(dit):
    usual = denoiser_of(load_pipeline(str(dit))).pos_embed
    larger = denoiser_of(load_pipeline(ModelConfig(path=str(dit), resolution=16)))
    assert larger.config.sample_size == 8
    positions = (larger.pos_embed(torch.zeros(1, 4, 8, 8)) - usual.proj.bias).view(4, 4, -1)
    native = (usual(torch.zeros(1, 4, 4, 4)) - usual.proj.bias).view(2, 2, -1)
    torch.testing.assert_close(positions[::2, ::2], native)  # every second one, at its old place
    assert not torch.allclose(positions[1, 1], native[1, 1])


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("unet", 9, "must be a multiple of 2; the model was made for 8"),
        ("dit", 6, "must be a multiple of 4; the model was made for 8"),
    ],
)
def test_a_side_that_would_lose_a_row_is_refused_before_anything_is_written(
    name, side, words, tiny_pipeline, dit, tmp_path
):
    path = {"unet": tiny_pipeline, "dit": dit}[name]
    config = from_dict({"model": {"path": str(path), "resolution": side}})
    with pytest.raises(ConfigError) as caught:
        run(config, str(tmp_path / "run"))
    assert str(caught.value) == f"model.resolution = {side}: {words}"
    assert not (tmp_path / "run").exists()


def test_a_side_that_the_denoiser_does_not_predict_is_refused(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(
        PublicModel, "blank_prediction", lambda model: torch.empty(1, 4, 5, 5, device="meta")
    )
    with pytest.raises(ConfigError, match=r"denoiser takes \(it predicts 5 x 5 latents\)"):
        opened(tiny_pipeline, 12)
    assert opened(tiny_pipeline).resolution == 8  # its own is not tried


@pytest.mark.long
@pytest.mark.parametrize("extra", [(), EVOLVED])
def test_a_whole_run_at_another_size(extra, folder, tiny_pipeline, tmp_path):
    out = tmp_path / "run"
    sized = ("--model.resolution=12", "--cluster.keep_cache=true", *extra)
    finish(command(folder, tiny_pipeline, out, *BARE, *ONE_CORE, *sized))
    assert read_synthetic(out / "synthetic")[0].shape == (60, 12, 12, 3)
    for moments in out.glob("private/latents/*/moments.npy"):
        assert np.load(moments, mmap_mode="r").shape[1:] == (8, 6, 6)


def test_keys_of_runs_at_the_models_own_size_are_what_they_were(tiny_pipeline):
    """A default run adds nothing; another size is another cache, another data set."""

    def keys(resolution: int | None, sampled: int | None = None) -> tuple[str, str]:
        model = opened(tiny_pipeline, resolution)
        recipe = Recipe.of(
            model,
            None,
            class_names=("a", "b"),
            prompts=PROMPTS,
            config=SynthesisConfig(resolution=sampled),
            seed=0,
        )
        return model.latents_key("data", PROMPTS), recipe.spec(100)

    usual = keys(None)
    assert keys(8) == usual
    assert keys(12)[0] != usual[0] and keys(12)[1] != usual[1]
    assert keys(None, 12)[1] == keys(12)[1]  # the same images, whoever asked for their size
    assert "model.resolution" not in result_keys(RunConfig())
    other = from_dict({"model": {"resolution": 64}})
    assert result_keys(other)["model.resolution"] == 64
    assert changed_keys(other, RunConfig()) == {"model.resolution": (64, None)}
    assert changed_keys(RunConfig(), other) == {"model.resolution": (None, 64)}
    assert ships_candidates(RunConfig()) and not ships_candidates(other)


@pytest.mark.parametrize(
    ("widths", "side", "device", "expected"),
    [
        ((320, 640, 1280, 1280), 8, "cpu", torch.contiguous_format),  # 64 pixels
        ((320, 640, 1280, 1280), 32, "cpu", torch.channels_last),  # 256
        ((320, 640, 1280, 1280), 8, "cuda", torch.channels_last),
        ((32, 64, 96), 8, "cpu", torch.channels_last),  # a bundled one
        (None, 32, "cpu", torch.channels_last),  # a transformer
    ],
)
def test_wide_convolutions_of_few_pixels_lie_as_cpus_like_them(widths, side, device, expected):
    config = {"block_out_channels": widths, "sample_size": side}
    assert conv_format(SimpleNamespace(config=config), device) == expected


def test_arithmetic_grows_with_the_pixels(tiny_pipeline):
    assert forward_gflop(opened(tiny_pipeline, 16)) > 3 * forward_gflop(opened(tiny_pipeline))
