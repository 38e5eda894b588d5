"""The latent cache: private files, whole or not there, the same as encoding at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sapf_ray.config import DataConfig, ModelConfig
from sapf_ray.data import open_source
from sapf_ray.errors import DataError
from sapf_ray.latents import LatentCache, build_latent_cache
from sapf_ray.models.loading import load_pipeline


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
        embeddings, pipe.text_encoder(tokens.input_ids)[0], rtol=1e-4, atol=1e-5
    )


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
