"""The public model without its weights: opened from config files, small, known by its content."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapf_ray.config import ModelConfig
from sapf_ray.errors import DataError
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel, content_hash

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))


def test_shapes_and_names_are_those_of_the_loaded_model(tiny_pipeline):
    model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    loaded = load_pipeline(str(tiny_pipeline))
    empty = {name: p.shape for name, p in model.denoiser.named_parameters()}
    assert empty == {name: p.shape for name, p in loaded.unet.named_parameters()}
    assert list(model.pool("qkvo")) == list(candidate_pool(loaded.unet, "qkvo"))
    assert model.resolution == resolution_of(loaded)


def test_it_travels_small_and_keeps_a_known_hash(tiny_pipeline):
    model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    digest, names = model.content_hash, list(model.pool("qkv"))
    travelled = pickle.dumps(model)
    assert len(travelled) < 10_000
    again = pickle.loads(travelled)
    assert again.__dict__["content_hash"] == digest  # no second pass over the weights
    assert list(again.pool("qkv")) == names and again == model


def test_hash_is_of_content_and_not_of_place_or_time(tiny_pipeline, copied):
    digest = content_hash(str(tiny_pipeline))
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))
    (copied / "README.md").write_text("Loading does not read this.")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        (copied / UNET).read_bytes()
    )
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"nor this, beside safetensors")
    (copied / "safety_checker").mkdir()
    (copied / "safety_checker" / "model.safetensors").write_bytes((copied / UNET).read_bytes())
    assert content_hash(str(copied)) == digest


def change_one_weight(copied: Path) -> None:
    weights = load_file(copied / UNET)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += torch.finfo(torch.float32).eps
    weights[name].view(-1)[0] *= 1.5
    save_file(weights, copied / UNET, metadata={"format": "pt"})


def change_prediction(copied: Path) -> None:
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))


def change_tokenizer(copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def swap_weights(copied: Path) -> None:
    """The same files under each other's names."""
    unet, vae = copied / UNET, copied / "vae" / "diffusion_pytorch_model.safetensors"
    first, second = unet.read_bytes(), vae.read_bytes()
    unet.write_bytes(second)
    vae.write_bytes(first)


@pytest.mark.parametrize(
    "change", [change_one_weight, change_prediction, change_tokenizer, swap_weights]
)
def test_hash_sees_every_file_that_loading_reads(tiny_pipeline, copied, change):
    change(copied)
    assert content_hash(str(copied)) != content_hash(str(tiny_pipeline))


def test_bin_weights_count_where_there_are_no_safetensors(copied):
    path = copied / "text_encoder"
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"one")
    one = content_hash(str(copied))
    (path / "pytorch_model.bin").write_bytes(b"two")
    assert content_hash(str(copied)) != one


def test_a_model_without_its_weights_is_one_line(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(DataError, match=r"model\.path") as caught:
        PublicModel.open(ModelConfig(path=str(copied)))
    with pytest.raises(DataError, match=r"model\.path"):
        content_hash(str(copied))
    assert "\n" not in str(caught.value)
