"""Every further family through the stages that learn, in one process: latents, selection, DP-SGD
with class tokens, the written adapter, images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sapf_ray.config import ModelConfig, SaliencyConfig
from sapf_ray.finetune.adapter import load_adapter
from sapf_ray.finetune.loop import train, write_adapter
from sapf_ray.finetune.objective import Objective
from sapf_ray.latents import CONDITIONS, LatentCache
from sapf_ray.models.class_tokens import TOKENS, with_class_tokens
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_features import posterior_moments
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.saliency.selection import Pass, score_records
from sapf_ray.synthesis.sampler import sample_images
from tests.families import SIDE, save_family
from tests.finetune.test_loop import N, make_job
from tests.whole_run import BARE, ONE_CORE, command, finish

FAMILIES = ["sdxl", "sd3", "flux", "pixart", "sana"]
PROMPTS = ("An image of the digit three", "An image of the digit one")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[None]:
    """A process group of this process."""
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def encoded(pipe: Any, directory: Path) -> LatentCache:
    """Latents of random images in two classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (N, 2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    directory.mkdir()
    np.save(directory / "moments.npy", posterior_moments(pipe.vae, images))
    np.save(directory / "labels.npy", generator.integers(0, 2, N))
    encode_conditions(pipe, PROMPTS).save(directory / CONDITIONS)
    return LatentCache(str(directory))


@pytest.mark.parametrize("name", FAMILIES)
def test_stages(name, alone, tmp_path):
    model = ModelConfig(path=str(save_family(name, tmp_path / "model")), resolution=2 * SIDE)
    pipe = load_pipeline(model)
    cache = encoded(pipe, tmp_path / "latents")
    work = Pass(
        model=model,
        cache=cache,
        config=SaliencyConfig(micro_batch_size=3, clipping="automatic"),
        key=NoiseKey.create(0),
    )
    records = np.arange(7)
    whole = score_records(pipe, records, work)
    # a shard has whole micro-batches: at another place in one, a record may be rounded differently
    parts = score_records(pipe, records[:3], work) + score_records(pipe, records[3:], work)
    assert all(torch.equal(a, b) for a, b in zip(whole.units, parts.units, strict=True))
    assert whole.units[0].numel() == len(candidate_pool(denoiser_of(pipe)))

    job = make_job(Path(model.path), cache, tmp_path / "job", class_tokens=True, steps=2)
    job = replace(job, model=model)
    objective = Objective.load(job)
    state = train(job, objective=objective)
    write_adapter(job, state, denoiser=objective.denoiser, directory=tmp_path / "adapter")
    assert state.step == 2 and state.factors[TOKENS].abs().max() > 0

    conditions = encode_conditions(pipe, PROMPTS)
    trained = load_pipeline(model)
    load_adapter(trained, tmp_path / "adapter")
    told = with_class_tokens(trained, conditions, tmp_path / "adapter")
    images = [
        sample_images(
            which,
            given,
            null=null_condition(which),
            seeds=[1, 2],
            steps=2,
            guidance_scale=50.0,
        )
        for which, given in ((pipe, conditions), (trained, told))
    ]
    assert images[0].shape == (2, 2 * SIDE, 2 * SIDE, 3) and (images[0] != images[1]).any()


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_run(name, folder, tmp_path):
    """As a command, on Ray."""
    model = save_family(name, tmp_path / "model")
    side = ("--model.resolution", str(2 * SIDE))
    finish(command(folder, model, tmp_path / "run", *BARE, *ONE_CORE, *side))
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()
    assert list((tmp_path / "run" / "synthetic").glob("*.parquet"))
