"""The driver's memory does not grow with the number of records."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from sapf_ray.config import ModelConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.latents import build_latent_cache

SIDE = 96
MIB = 2**20


class Generated(ImageSource):
    """Images made from their index where they are read; nothing is stored."""

    name = "generated"
    class_names = ("a", "b")
    prompts = ("An image of a", "An image of b")
    n_test = 0

    def __init__(self, n_train: int) -> None:
        self.n_train = n_train

    def read(self, split, indices, *, resolution):
        assert resolution == SIDE
        pixels = np.broadcast_to(
            (indices % 251).astype(np.uint8)[:, None, None, None], (len(indices), SIDE, SIDE, 3)
        )
        return pixels, self.labels(split)[indices]

    def labels(self, split):
        return np.arange(self.n_train) % 2

    def fingerprint(self):
        return str(self.n_train)

    def verify(self, splits=()):
        pass


def small_pipeline(tiny: Path, directory: Path) -> str:
    """96x96 images, 4x12x12 latents; as little arithmetic as that shape allows."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    from sapf_ray.models.loading import load_pipeline

    pipe = load_pipeline(str(tiny))
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(1, 1, 1, 4),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=SIDE,
    )
    pipe.unet.register_to_config(sample_size=SIDE // 8)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return str(directory)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_300000_records_of_96_pixels_do_not_fill_the_driver(ray_cluster, tiny_pipeline, tmp_path):
    model = small_pipeline(tiny_pipeline, tmp_path / "model")
    build_latent_cache(
        tmp_path / "warm",
        Generated(2000),
        model=ModelConfig(path=model),
        shard_size=512,
    )
    me = psutil.Process()
    stop = threading.Event()

    def own() -> int:
        """Bytes that are the process's own.

        Mapped files and Ray's shared object store can be taken back at any time.
        """
        memory = me.memory_info()
        return memory.rss - memory.shared

    before = own()
    most = 0
    resident = 0

    def watch() -> None:
        nonlocal most, resident
        while not stop.wait(0.05):
            most = max(most, own())
            resident = max(resident, me.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cache = build_latent_cache(
        tmp_path / "latents",
        Generated(300_000),
        model=ModelConfig(path=model),
        shard_size=512,
    )
    stop.set()
    watcher.join()
    grown = (most - before) / MIB
    print(
        f"driver: {grown:.0f} MiB more of its own, {resident / MIB:.0f} MiB resident with "
        "mapped files; 8.3 GB of images"
    )
    moments = np.load(Path(cache.directory) / "moments.npy", mmap_mode="r")
    assert moments.shape == (300_000, 8, 12, 12)
    assert np.array_equal(moments[3], moments[3 + 251]) and not np.array_equal(
        moments[3], moments[4]
    )
    assert grown < 100
