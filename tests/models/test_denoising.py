from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from sapf_ray.config import FinetuneConfig
from sapf_ray.errors import ConfigError
from sapf_ray.models.denoising import draw
from sapf_ray.models.processes import Diffusion
from sapf_ray.privacy.keyed_rng import NoiseKey


def test_timesteps_are_uniform_over_the_part_asked_for():
    t = draw(
        NoiseKey.create(0),
        "p",
        0,
        np.arange(2000),
        k=2,
        latent_shape=(1, 1, 1),
        process=Diffusion(DDPMScheduler()),
        part=(0.2, 0.8),
    ).timesteps
    assert 200 <= t.min() < 210 and 790 < t.max() < 800
    assert abs(t.double().mean().item() - 499.5) < 4 * 173.2 / 4000**0.5
    whole = draw(
        NoiseKey.create(0),
        "p",
        0,
        np.arange(2000),
        k=1,
        latent_shape=(1, 1, 1),
        process=Diffusion(DDPMScheduler()),
    ).timesteps
    assert whole.min() < 10 and whole.max() > 990


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"timestep_start": 1.0}, "timestep_start"),
        ({"timestep_start": 0.5, "timestep_end": 0.5}, "timestep_end"),
        ({"timestep_end": 1.5}, "timestep_end"),
    ],
)
def test_an_empty_part_of_the_diffusion_is_refused(values, field):
    with pytest.raises(ConfigError, match=rf"finetune\.{field}"):
        FinetuneConfig(**values)
