"""What a sampling actor does: the images of one shard, and its Parquet file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sapf_ray.finetune.adapter import load_adapter
from sapf_ray.models.class_tokens import with_class_tokens
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.device import conv_format, pick_device
from sapf_ray.models.loading import load_pipeline
from sapf_ray.synthesis.launcher import SamplingJob
from sapf_ray.synthesis.sampler import sample_images
from sapf_ray.synthesis.sampling_plan import Shard
from sapf_ray.synthesis.writer import encode_png, note_made, write_shard


class ShardMaker:
    """Holds one pipeline, with the adapter merged into its weights.

    Args:
        job: What to make.

    Raises:
        DataError: Model or adapter missing or damaged.
    """

    def __init__(self, job: SamplingJob) -> None:
        torch.set_num_threads(max(1, int(job.config.cpus_per_actor)))
        self.job = job
        self.encoder = ThreadPoolExecutor(1)
        self.pipe = _pipeline(job)
        public = encode_conditions(self.pipe, job.prompts, class_labels=job.model.class_labels)
        adapter = Path(job.adapter_dir) if job.adapter_dir else None
        self.conditions = with_class_tokens(self.pipe, public, adapter)
        self.null = null_condition(self.pipe)

    def make(self, shard: Shard) -> None:
        """Samples and writes a shard."""
        job = self.job
        images, seen = self._sample(job.plan.candidate_labels(shard), shard=shard)
        chosen = None
        if job.labelling is not None:
            kept, chosen = job.labelling.choose(np.concatenate(seen), job.plan, shard)
            images = [images[row] for row in kept]
        write_shard(
            Path(job.out_dir),
            job.plan,
            shard=shard,
            images=images,
            class_names=job.class_names,
            prompts=job.prompts,
            spec=job.spec,
            chosen=chosen,
        )
        note_made(Path(job.out_dir), shard, 0)

    def _sample(self, labels: np.ndarray, *, shard: Shard) -> tuple[list[bytes], list[np.ndarray]]:
        """The shard's candidates: PNG files, and blocks of their features where a head sees them.

        Args:
            labels: int64 (m,), their classes.
            shard: Which part of the data set.
        """
        job = self.job
        config = job.config
        seeds = job.plan.candidate_seeds(shard)
        encoded = []  # one batch becomes PNG files while the next is sampled
        seen = []
        for start in range(0, len(labels), config.batch_size):
            batch = slice(start, start + config.batch_size)
            images = sample_images(
                self.pipe,
                self.conditions[torch.from_numpy(labels[batch])],
                null=self.null,
                seeds=seeds[batch],
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                resolution=config.resolution,
            )
            encoded.append(self.encoder.submit(encode_png, images))
            if job.labelling is not None:
                seen.append(job.labelling.see(self.pipe, images))
            made = min(start + config.batch_size, len(labels))
            note_made(Path(job.out_dir), shard, shard.rows * made // len(labels))
        return [file for batch in encoded for file in batch.result()], seen


def _pipeline(job: SamplingJob) -> Any:
    """The public pipeline with the adapter merged into its weights."""
    pipe: Any = load_pipeline(job.model, device=pick_device(job.config.gpus))
    if job.adapter_dir is not None:
        load_adapter(pipe, Path(job.adapter_dir))
    denoiser = denoiser_of(pipe)
    denoiser.to(memory_format=conv_format(denoiser, denoiser.device.type))
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe
