"""The latent cache: private files, whole or not there, the same as encoding at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sapf_ray.config import DataConfig, ModelConfig
from sapf_ray.data import open_source
from sapf_ray.data.base import SKIPPED, ImageSource
from sapf_ray.errors import DataError
from sapf_ray.latents import LatentCache, build_latent_cache
from sapf_ray.models.feature_table import make_features
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_model import PublicModel


class Counting(ImageSource):
    """20 images of two classes, the seventh unreadable; notes which of train are decoded."""

    name = "counting"
    class_names = prompts = ("a", "b")
    n_train = n_test = 20

    def __init__(self, reads: str) -> None:
        self.reads = reads

    def labels(self, split):
        return np.arange(20) % 2

    def read(self, split, indices, *, resolution):
        if split == "train":
            with open(self.reads, "a") as file:
                file.write(" ".join(map(str, indices)) + " ")
        images = np.random.default_rng(0).integers(0, 256, (20, resolution, resolution, 3))
        labels = self.labels(split)
        labels[7] = SKIPPED
        return images[indices].astype(np.uint8), labels[indices]

    def fingerprint(self) -> str:
        return "counting"

    def verify(self, splits=()) -> None:
        pass


@pytest.fixture(scope="module")
def built(ray_cluster, tiny_pipeline, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "private" / "latents"
    progress: list[tuple[int, int]] = []
    source = open_source(DataConfig(source="digits"))
    cache = build_latent_cache(
        directory,
        source,
        model=ModelConfig(path=str(tiny_pipeline)),
        shard_size=400,
        on_progress=lambda *p: progress.append(p),
    )
    return cache, source, directory, progress


def test_files_are_for_their_owner_only(built):
    cache, _, directory, progress = built
    assert cache.complete and progress[-1] == (4, 4)
    assert cache.latent_shape == (4, 4, 4)
    sensitive = [directory / "moments.npy", directory / "labels.npy"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in sensitive)
    assert not list(directory.glob("*partial*"))


def test_images_are_encoded_at_the_requested_size(ray_cluster, tiny_pipeline, tmp_path):
    model = ModelConfig(path=str(tiny_pipeline), resolution=12)
    source = Counting(str(tmp_path / "reads"))
    cache = build_latent_cache(tmp_path / "latents", source, model=model, shard_size=20)
    assert cache.latent_shape == (4, 6, 6)


def test_records_are_those_of_the_source(built, tiny_pipeline):
    cache, source, _, _ = built
    records = np.array([1200, 3, 777])
    moments, embeddings = cache.read(records)
    images, labels = source.read("train", records, resolution=8)
    pipe = load_pipeline(str(tiny_pipeline))
    with torch.no_grad():
        expected = pipe.vae.encode(
            torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        ).latent_dist.parameters
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)
    tokens = pipe.tokenizer(
        [source.prompts[i] for i in labels],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    torch.testing.assert_close(
        embeddings.states, pipe.text_encoder(tokens.input_ids)[0], rtol=1e-4, atol=1e-5
    )


def test_features_come_from_the_same_decoding(ray_cluster, tmp_path):
    model = ModelConfig(path="glyphs-tiny")
    features = make_features("auto", model)
    source = Counting(reads=str(tmp_path / "reads"))
    directory = tmp_path / "latents"
    cache = build_latent_cache(directory, source, model=model, shard_size=8, features=features)
    assert cache.complete and cache.has_features
    assert (directory / "features.npy").stat().st_mode & 0o777 == 0o600
    assert not list(directory.glob("*partial*"))
    assert sorted((tmp_path / "reads").read_text().split()) == sorted(map(str, range(20)))
    blocks = list(cache.record_features(block=6))
    assert [len(labels) for _, labels in blocks] == [6, 6, 6, 2]
    labels = np.concatenate([labels for _, labels in blocks])
    expected = np.arange(20) % 2
    expected[7] = SKIPPED
    assert labels.tolist() == expected.tolist() == cache.counted_labels().tolist()
    rows = np.concatenate([rows for rows, _ in blocks])
    assert np.isnan(rows[7]).all()
    images, _ = source.read("test", np.arange(20), resolution=32)
    kept = labels != SKIPPED
    assert np.allclose(rows[kept], features(images)[kept], atol=1e-4)


def test_the_key_of_a_cache_includes_the_features(tiny_pipeline):
    model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
    keys = {model.latents_key("data", ("a", "b"), features) for features in (None, "x", "y")}
    assert len(keys) == 3 and model.latents_key("data", ("a", "b")) in keys


def test_half_a_cache_is_not_complete(built, tmp_path):
    _, _, directory, _ = built
    (tmp_path / "labels.npy").write_bytes((directory / "labels.npy").read_bytes())
    assert not LatentCache(str(tmp_path)).complete


def test_an_image_that_breaks_inside_a_task_is_named_in_one_line(
    ray_cluster, tiny_pipeline, tmp_path
):
    for name in ("a", "b"):
        for split, n in (("train", 3), ("test", 1)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(
                    tmp_path / "images" / split / name / f"{i}.png"
                )
    source = open_source(DataConfig(source="image_folder", path=str(tmp_path / "images")))
    broken = tmp_path / "images" / "train" / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError) as caught:
        build_latent_cache(
            tmp_path / "latents",
            source,
            model=ModelConfig(path=str(tiny_pipeline)),
            shard_size=4,
        )
    assert (
        type(caught.value) is DataError
        and str(broken) in str(caught.value)
        and "\n" not in str(caught.value)
    )
