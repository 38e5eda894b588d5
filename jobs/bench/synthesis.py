"""Contenders of synthesis.

The sampling actor's own loop against a loop of pipeline calls, same seeds and prompts.

A step makes ``case.n`` images in batches of ``case.batch`` and encodes them as PNG; it returns the
pixels.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from jobs.bench.models import Case, write_pipeline
from jobs.bench.selection import Step
from jobs.bench.training import save_random_adapter
from sapf_ray.config import ModelConfig, SynthesisConfig
from sapf_ray.models.location import resolve_model
from sapf_ray.synthesis.launcher import SamplingActor, SamplingJob
from sapf_ray.synthesis.sampling_plan import SamplingPlan

CLASSES = tuple("0123456789")
PROMPTS = tuple(f"An image of {name}" for name in CLASSES)
STEPS = 20
GUIDANCE = 1.5
PASSES = 2 * STEPS  # of the denoiser for an image: guided


def _files(case: Case) -> SimpleNamespace:
    """Pipeline and adapter in a scratch directory of this contender's own."""
    scratch = Path(tempfile.mkdtemp(dir=case.directory or None))
    return SimpleNamespace(
        model=write_pipeline(case.size, scratch / "pipeline"),
        out=scratch / "images",
        adapter=save_random_adapter(case, scratch / "adapter"),
    )


def _plan(case: Case) -> SamplingPlan:
    return SamplingPlan(
        n_images=case.n,
        n_classes=len(CLASSES),
        shard_size=case.n,
        seed=0,
    )


def ours(case: Case) -> Step:
    """:class:`SamplingActor` without Ray around it; writes the Parquet shard too."""
    files = _files(case)
    plan = _plan(case)
    files.out.mkdir()
    config = SynthesisConfig(
        n_images=case.n,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        batch_size=case.batch,
        shard_size=case.n,
        cpus_per_actor=case.threads,
        gpus_per_actor=float(case.device == "cuda"),
    )
    model = ModelConfig(path=files.model, dtype=case.dtype)  # type: ignore[arg-type]
    actor = SamplingActor(
        SamplingJob(
            out_dir=str(files.out),
            model=model,
            adapter_dir=files.adapter,
            class_names=CLASSES,
            prompts=PROMPTS,
            config=config,
            plan=plan,
            spec="benchmark",
        )
    )
    (shard,) = plan.shards

    def step() -> _Encoded:
        actor.make_shard(shard)
        return _Encoded(files.out / shard.file)

    return step


class _Encoded:
    """Pixels of a shard, decoded only when somebody looks: reading is not part of the step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = pq.read_table(self.path).column("image").to_pylist()
        return np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]).astype(
            dtype or np.uint8
        )


def pipeline(case: Case) -> Step:
    """``StableDiffusionPipeline`` with ``load_lora_weights``, called batch after batch."""
    files = _files(case)
    plan = _plan(case)
    torch.set_num_threads(case.threads)
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        resolve_model(files.model),
        dtype=getattr(torch, case.dtype),
        safety_checker=None,
        requires_safety_checker=False,
    ).to(case.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(files.adapter)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )
    (shard,) = plan.shards
    prompts = [PROMPTS[label] for label in plan.labels(shard)]
    seeds = plan.seeds(shard)

    def step() -> list[Image.Image]:
        images: list[Image.Image] = []
        for start in range(0, case.n, case.batch):
            part = slice(start, start + case.batch)
            generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[part]]
            images += pipe(
                prompts[part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                output_type="pil",
            ).images
        for image in images:
            image.save(io.BytesIO(), format="PNG")
        return images

    return step
