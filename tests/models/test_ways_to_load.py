"""Models as people have them: fp16-only folders, revisions, single files, a scheduler that says
nothing, machines without a network. What does not fit is one line, before an image is read.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapf_ray.config import ModelConfig, from_dict
from sapf_ray.errors import ConfigError, DataError, SapfError
from sapf_ray.models import hub_cache
from sapf_ray.models.families import read_index
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.location import resolve_model
from sapf_ray.models.public_model import PublicModel, content_hash
from sapf_ray.models.text_encoder import text_states
from sapf_ray.pipeline import run
from sapf_ray.synthesis.sampler import solver
from tests.models.single_file import save_single_file

HUB_ID = "owner/name"


@pytest.fixture(scope="module")
def only_fp16(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights are of the variant fp16."""
    folder = tmp_path_factory.mktemp("fp16") / "pipeline"
    pipe = load_pipeline(str(tiny_pipeline)).to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a single file."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    return save_single_file(load_pipeline(str(tiny_pipeline)), path)


def refused(match: str, **model: Any) -> None:
    """Opening is one line, long before a run would read an image."""
    with pytest.raises(SapfError, match=match) as caught:
        PublicModel.open(ModelConfig(**model))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.")


def same_weights(first: Any, second: Any) -> bool:
    return all(
        torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
    )


def test_a_folder_of_one_variant_alone(only_fp16, tiny_pipeline):
    config = ModelConfig(path=str(only_fp16), variant="fp16")
    model = PublicModel.open(config)
    pipe = load_pipeline(config)
    assert pipe.unet.dtype == torch.float32  # as model.dtype says
    whole = load_pipeline(str(tiny_pipeline)).unet.to(torch.float16).float()
    assert same_weights(whole, pipe.unet)
    assert model.content_hash != content_hash(str(tiny_pipeline))
    states, _ = text_states(config, ["An image of the digit one"])
    assert states.shape == (1, 16, 16)
    refused("model.variant = None: must be one of the variants .* holds: fp16", path=str(only_fp16))
    refused("model.variant = 'ema': must be one .*: fp16", path=str(only_fp16), variant="ema")
    refused("must be one .*: none", path=str(tiny_pipeline), variant="fp16")


def test_both_variants_have_a_hash_of_their_own(only_fp16, tiny_pipeline, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(tiny_pipeline, both)
    for path in only_fp16.rglob("*.fp16.safetensors"):
        shutil.copy(path, both / path.relative_to(only_fp16))
    assert content_hash(str(both)) == content_hash(str(tiny_pipeline))
    halves = ModelConfig(path=str(both), variant="fp16")
    assert content_hash(halves) not in (content_hash(str(both)), None)


def test_a_single_file_is_the_pipeline_it_was_made_of(checkpoint, tiny_pipeline):
    config = ModelConfig(path=str(checkpoint), configs=str(tiny_pipeline))
    model = PublicModel.open(config)
    usual = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    assert list(model.pool("qkv")) == list(usual.pool("qkv"))
    assert model.content_hash != usual.content_hash
    pipe = load_pipeline(config)
    whole = load_pipeline(str(tiny_pipeline))
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(whole, part), getattr(pipe, part)), part
    prompts = ["An image of the digit one"]
    assert torch.equal(text_states(config, prompts)[0], text_states(str(tiny_pipeline), prompts)[0])


def test_a_single_file_needs_configs_that_fit(checkpoint, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    path = str(checkpoint)
    refused("model.configs = None: must name a folder with the configs", path=path)
    refused("model.configs = .*: no model_index.json there", path=path, configs=str(tmp_path))
    refused("model.variant", path=path, configs=str(tiny_pipeline), variant="fp16")
    refused("must be left out, unless", path=str(tiny_pipeline), configs=str(tiny_pipeline))
    wider = tmp_path / "wider"
    shutil.copytree(tiny_pipeline, wider)
    change(wider / "unet" / "config.json", block_out_channels=[16, 16])
    refused("does not hold the network of its config: .* must have", path=path, configs=str(wider))


@pytest.mark.parametrize(
    ("beginning", "part"),
    [("model.diffusion_model.", "U-Net"), ("first_stage_model.", "VAE"), ("cond_", "text encoder")],
)
def test_a_file_without_a_part_of_the_model(beginning, part, tiny_pipeline, tmp_path):
    path = tmp_path / "part.safetensors"
    save_single_file(load_pipeline(str(tiny_pipeline)), path, without=beginning)
    refused(f"holds no {part} ", path=str(path), configs=str(tiny_pipeline))


def test_files_that_are_no_checkpoint(checkpoint, tmp_path):
    refused("no such file", path=str(tmp_path / "gone.safetensors"))
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    refused("is a pickle, which can run code", path=str(pickled))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(DataError, match="truncated or damaged"):
        PublicModel.open(ModelConfig(path=str(cut)))


def test_a_denoiser_with_a_tensor_missing_would_get_random_numbers(tiny_pipeline, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copied)
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    refused("unet/ does not hold the network .*: 1 of 208 tensors differ", path=str(copied))
    with pytest.raises(DataError, match="1 of 208"):
        run(from_dict({"model": {"path": str(copied)}}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    path.unlink()
    refused("no weights in unet/", path=str(copied))


def test_prediction_type_of_a_scheduler_that_does_not_say(tiny_pipeline):
    config = ModelConfig(path=str(tiny_pipeline), prediction_type="v_prediction")
    pipe = load_pipeline(config)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert solver(pipe).config.prediction_type == "v_prediction"
    model, usual = PublicModel.open(config), PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    assert model.shown_by != usual.shown_by and model.content_hash == usual.content_hash


def test_float16_is_for_gpus_and_leaves_the_vae_in_float32(tiny_pipeline, tmp_path):
    config = ModelConfig(path=str(tiny_pipeline), dtype="float16")
    pipe = load_pipeline(config)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16
    assert pipe.vae.dtype == torch.float32
    on_cpu = from_dict(
        {
            "model": {"path": str(tiny_pipeline), "dtype": "float16"},
            "finetune": {"batch_size": 16},
            "privacy": {"non_private": True},
        }
    )
    with pytest.raises(ConfigError, match="on CPUs use bfloat16 or float32") as caught:
        run(on_cpu, str(tmp_path / "run"))
    stages = "saliency.gpus_per_task, finetune.gpus_per_worker, synthesis.gpus_per_actor"
    assert f"needs GPUs, and {stages} is 0" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_flow_has_no_other_prediction(tiny_pipeline, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copied)
    change(copied / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    refused("model.prediction_type", path=str(copied), prediction_type="epsilon")


@pytest.fixture
def cache(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model in two commits; the branch old and the tag v1 lead to one."""
    root = tmp_path / "hub" / "models--owner--name"
    for commit in ("aaa", "bbb"):
        shutil.copytree(tiny_pipeline, root / "snapshots" / commit)
    change(root / "snapshots" / "aaa" / "unet" / "config.json", sample_size=8)
    (root / "refs").mkdir()
    (root / "refs" / "old").write_text("aaa")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return root


def test_a_cached_model_is_read_from_the_cache_at_its_revision(cache, monkeypatch):
    monkeypatch.setattr(hub_cache, "reach_hub", lambda: pytest.fail("asks the hub"))
    sides = {
        revision: PublicModel.open(ModelConfig(path=HUB_ID, revision=revision)).native_resolution
        for revision in ("old", "aaa", "bbb")
    }
    assert sides == {"old": 16, "aaa": 16, "bbb": 8}
    assert resolve_model(HUB_ID).startswith(str(cache))
    (cache / "snapshots" / "bbb" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert resolve_model(ModelConfig(path=HUB_ID, revision="bbb")) == HUB_ID  # not whole


def test_a_local_model_has_no_revision(tiny_pipeline):
    refused("model.revision = 'main': must be left out", path=str(tiny_pipeline), revision="main")
    with pytest.raises(ConfigError, match=r"model\.revision = '\.\./x'"):
        ModelConfig(path=HUB_ID, revision="../x")


def test_without_a_network_the_answer_comes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1 is not reached.*hf download owner/name"):
        read_index(HUB_ID)
    monkeypatch.setattr(hub_cache.socket, "create_connection", silent)
    monkeypatch.setattr(hub_cache, "PATIENCE", 0.2)
    with pytest.raises(DataError, match=r"no answer in 0\.2 s"):
        read_index(HUB_ID)
    assert time.monotonic() - began < 5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        read_index(HUB_ID)


def silent(*_: Any, **__: Any) -> None:
    """A network that swallows everything, for a while."""
    time.sleep(2)
    raise TimeoutError("timed out")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
