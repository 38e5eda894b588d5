"""Random and variation on a tiny pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapf_ray.config import ModelConfig
from sapf_ray.evolution.api import DiffusionApi, decode_images, latent_means, vary_images
from sapf_ray.models.conditioning import encode_conditions, null_condition, predict
from sapf_ray.models.loading import kept_pipeline
from sapf_ray.models.processes import forward_process
from sapf_ray.models.solvers import solver
from sapf_ray.synthesis.sampler import initial_noise, sample_images

PROMPTS = ("an ant", "a bee", "a cat")
LABELS, SEEDS = np.array([0, 1, 2, 1, 0]), np.array([3, 2**63 - 1, 5, 7, 11])


@pytest.fixture(scope="module")
def api(tiny_pipeline):
    return DiffusionApi(
        model=ModelConfig(path=str(tiny_pipeline)),
        prompts=PROMPTS,
        steps=6,
        guidance_scale=2.0,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def parents(api):
    return api.random(LABELS, np.arange(5))


def apart(a, b):
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_random_is_what_synthesis_makes(api):
    pipe = kept_pipeline(api.model, "cpu")
    context, empty = encode_conditions(pipe, PROMPTS)[LABELS], null_condition(pipe)
    expected = sample_images(pipe, context, null=empty, seeds=SEEDS, steps=6, guidance_scale=2.0)
    assert np.abs(api.random(LABELS, SEEDS).astype(int) - expected).max() <= 1


def test_variation_at_strength_one_is_a_fresh_image(api, parents):
    fresh = api.vary(parents, LABELS, SEEDS, 1.0)
    assert np.array_equal(fresh, api.random(LABELS, SEEDS))
    assert np.array_equal(fresh, api.vary(255 - parents, LABELS, SEEDS, 1.0))


def test_small_strengths_keep_the_parent_and_large_ones_lose_it():
    """On the bundled model, for a random VAE keeps nothing: mean distance to the parent's
    reconstruction, in grey levels.
    """
    api = DiffusionApi(
        model=ModelConfig(),
        prompts=tuple(f"An image of the digit {name}" for name in ("one", "two", "three")),
        steps=10,
        guidance_scale=2.0,
    )
    pipe, labels = kept_pipeline(api.model, "cpu"), LABELS[:3]
    parents = api.random(labels, np.arange(3))
    kept = decode_images(pipe, latent_means(pipe, parents) * pipe.vae.config.scaling_factor)
    distances = [
        apart(api.vary(parents, labels, SEEDS[:3], s), kept) for s in (0.001, 0.05, 0.3, 0.6, 0.9)
    ]
    assert apart(parents, kept) < 2 and distances[0] < 2
    assert distances == sorted(distances)
    fresh = apart(api.vary(parents, labels, SEEDS[:3], 1.0), kept)
    assert distances[2] < fresh / 2 < distances[4]


def test_close_strengths_differ(api, parents):
    """Also where both take the same number of solver steps."""
    assert not np.array_equal(
        api.vary(parents, LABELS, SEEDS, 0.40), api.vary(parents, LABELS, SEEDS, 0.42)
    )


def test_an_image_depends_on_its_own_parent_label_and_seed_alone(api, parents):
    together = api.vary(parents, LABELS, SEEDS, 0.5)
    alone = np.concatenate(
        [api.vary(parents[i : i + 1], LABELS[i : i + 1], SEEDS[i : i + 1], 0.5) for i in range(5)]
    )
    assert np.abs(together.astype(int) - alone).max() <= 1
    torch.manual_seed(99)
    assert np.array_equal(together, api.vary(parents, LABELS, SEEDS, 0.5))
    assert not np.array_equal(together, api.vary(parents, LABELS, SEEDS + 1 - 2 * (SEEDS % 2), 0.5))
    assert apart(together, api.vary(parents[::-1].copy(), LABELS, SEEDS, 0.5)) > 0


def test_the_prompt_and_guidance_reach_a_variation(tiny_pipeline, api, parents):
    # a random text encoder hardly moves a random U-Net: look at a guidance strong enough to show
    strong = DiffusionApi(model=api.model, prompts=PROMPTS, steps=6, guidance_scale=500.0)
    base = strong.vary(parents, LABELS, SEEDS, 0.5)
    assert not np.array_equal(base, api.vary(parents, LABELS, SEEDS, 0.5))
    assert not np.array_equal(base, strong.vary(parents, (LABELS + 1) % 3, SEEDS, 0.5))


def test_variation_is_noising_and_then_the_solver(api, parents):
    pipe = kept_pipeline(api.model, "cpu")
    context, empty = encode_conditions(pipe, PROMPTS)[LABELS], null_condition(pipe)
    ours = vary_images(
        pipe,
        parents,
        conditions=context,
        null=empty,
        seeds=SEEDS,
        strength=0.5,
        steps=10,
        guidance_scale=1.0,
    )
    scheduler = solver(pipe)
    scheduler.set_timesteps(timesteps=[500, 400, 300, 200, 100])
    clean = latent_means(pipe, parents) * pipe.vae.config.scaling_factor
    latents = forward_process(pipe).noisy(
        clean, initial_noise(SEEDS, (4, 4, 4)), torch.tensor([500] * 5)
    )
    for t in scheduler.timesteps:
        with torch.no_grad():
            latents = scheduler.step(
                predict(pipe.unet, latents, t, context), t, latents
            ).prev_sample
    assert np.abs(ours.astype(int) - decode_images(pipe, latents)).max() <= 1
