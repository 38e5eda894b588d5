from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from jobs.chaos import ray_workers
from sapf_ray.config import ModelConfig, SynthesisConfig
from sapf_ray.errors import ClusterError, DataError
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis import launcher
from sapf_ray.synthesis.launcher import synthesize
from sapf_ray.synthesis.recipe import Recipe
from sapf_ray.synthesis.writer import note_made, noted, read_synthetic
from tests.reuse.runs import in_this_process

NAMES, PROMPTS = ("ant", "bee", "cat"), ("an ant", "a bee", "a cat")
CONFIG = SynthesisConfig(
    n_images=22, steps=2, guidance_scale=2.0, batch_size=3, shard_size=8, num_actors=2
)


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return PublicModel.open(ModelConfig(path=str(tiny_pipeline)))


def make(out, model, config=CONFIG, adapter=None):
    """Runs the synthesis; returns the progress it reported."""
    progress = []
    synthesize(
        out,
        model,
        adapter_dir=adapter,
        class_names=NAMES,
        prompts=PROMPTS,
        config=config,
        seed=5,
        privacy_note=PrivacyNote(text="epsilon = 1"),
        on_progress=lambda *step: progress.append(step),
    )
    return progress


def digests(directory):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.glob("*.parquet"))
    }


@pytest.fixture(scope="module")
def by_two_actors(model, ray_cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    progress = make(out, model)
    assert progress[0] == (0, 22) and progress[-1] == (22, 22) and len(progress) >= 4
    assert progress == sorted(progress), "parts of shards are told, too"
    return out


@pytest.fixture
def here(monkeypatch):
    """One actor's work without its process, for what any actor does alike; two real ones make
    ``by_two_actors``.
    """
    monkeypatch.setattr(launcher, "_run_queue", in_this_process)


@pytest.fixture(scope="module")
def adapter(tiny_pipeline, tmp_path_factory):
    """A LoRA of the tiny pipeline, large enough to change pixels."""
    pipe = load_pipeline(str(tiny_pipeline))
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=3.0)
    directory = tmp_path_factory.mktemp("adapter")
    StableDiffusionPipeline.save_lora_weights(
        directory, unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )
    return directory


def test_one_actor_redoes_lost_and_truncated_shards_to_the_same_bytes(
    by_two_actors, model, tmp_path, here
):
    expected = digests(by_two_actors)
    for path in by_two_actors.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert make(tmp_path, model) == [(22, 22)]  # nothing to do
    lost, truncated, kept = sorted(tmp_path.glob("*.parquet"))
    lost.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-20])
    written = kept.stat().st_mtime_ns
    assert make(tmp_path, model, replace(CONFIG, num_actors=1)) == [(6, 22), (14, 22), (22, 22)]
    assert digests(tmp_path) == expected and kept.stat().st_mtime_ns == written


def test_an_unfinished_shard_says_how_many_images_it_has(
    model, ray_cluster, tmp_path, here, monkeypatch
):
    from sapf_ray.synthesis import shard_maker

    told: list[int] = []

    def note(directory, shard, made):
        note_made(directory, shard, made)
        told.append(noted(directory))

    monkeypatch.setattr(shard_maker, "note_made", note)
    make(tmp_path, model, replace(CONFIG, n_images=8, batch_size=3))
    assert told == [3, 6, 8, 0]
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob(".*"))


def test_the_adapter_changes_the_images(by_two_actors, model, adapter, tmp_path, here):
    make(tmp_path, model, replace(CONFIG, num_actors=1), adapter)
    plain, adapted = read_synthetic(by_two_actors)[0], read_synthetic(tmp_path)[0]
    assert plain.shape == adapted.shape == (22, 8, 8, 3) and (plain != adapted).any()


def test_a_damaged_adapter_is_one_line(model, ray_cluster, tmp_path, here):
    """Through Ray errors come as those of all tasks do, see tests/evaluation/test_protocol.py."""
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "pytorch_lora_weights.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(DataError, match="cannot be loaded as an adapter") as caught:
        make(tmp_path / "out", model, replace(CONFIG, n_images=3), broken)
    assert "\n" not in str(caught.value) and str(broken) in str(caught.value)
    with pytest.raises(DataError, match="no such adapter"):
        make(tmp_path / "out", model, adapter=tmp_path / "nowhere")


def test_the_spec_covers_all_that_decides_the_images_and_nothing_else(model, adapter, tmp_path):
    def spec(model=model, adapter=None, names=NAMES, prompts=PROMPTS, config=CONFIG, seed=5):
        recipe = Recipe.of(
            model, adapter, class_names=names, prompts=prompts, config=config, seed=seed
        )
        return recipe.spec(config.n_images)

    results = {
        "n_images": 20,
        "steps": 3,
        "guidance_scale": 3.0,
        "shard_size": 9,
        "batch_size": 4,
        "class_proportions": (3, 1, 1),
        "resolution": 16,
    }
    specs = [
        spec(),
        spec(adapter=str(adapter)),
        spec(seed=6),
        spec(prompts=("x", "y", "z")),
        spec(names=("x", "y", "z")),
    ]
    specs += [spec(config=replace(CONFIG, **{key: value})) for key, value in results.items()]
    specs += [spec(model=replace(model, config=replace(model.config, dtype="bfloat16")))]
    assert len(set(specs)) == len(specs)
    assert spec() == spec(config=replace(CONFIG, num_actors=7, cpus_per_actor=2.0))
    copied = shutil.copytree(model.path, tmp_path / "copied")
    assert spec() == spec(model=PublicModel.open(ModelConfig(path=str(copied))))
    scheduler = tmp_path / "copied" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert spec() != spec(model=PublicModel.open(ModelConfig(path=str(copied))))


def test_an_actor_larger_than_any_node_is_refused(model, ray_cluster, tmp_path):
    with pytest.raises(ClusterError, match="cpus_per_actor"):
        make(tmp_path, model, replace(CONFIG, cpus_per_actor=64.0))


@pytest.mark.long
def test_more_actors_than_room_still_finishes(model, ray_cluster, tmp_path):
    make(tmp_path, model, replace(CONFIG, num_actors=3, cpus_per_actor=2.0))
    assert len(read_synthetic(tmp_path)[0]) == 22


def test_a_killed_actor_process_is_restarted_and_the_shard_redone(by_two_actors, model, tmp_path):
    killed = []

    def kill_one(done, total):
        if 0 < done < total and len(killed) < 2:
            # a worker of an earlier test may be gone or a zombie by now: ray_workers leaves those
            # out
            actor = next(iter(ray_workers(os.getpid(), "ray::SamplingActor")), None)
            if actor:
                actor.kill()
                killed.append(actor.pid)

    config = replace(CONFIG, num_actors=1, batch_size=3)
    synthesize(
        tmp_path,
        model,
        adapter_dir=None,
        class_names=NAMES,
        prompts=PROMPTS,
        config=config,
        seed=5,
        privacy_note=PrivacyNote(text=""),
        on_progress=kill_one,
    )
    assert killed and digests(tmp_path) == digests(by_two_actors)
