"""Sampling the synthetic data set."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from sapf_ray.config.kinds import Count, CountOrZero, NotNegative, Positive
from sapf_ray.config.section import section


@section("synthesis")
class SynthesisConfig:
    """Sampling the synthetic data set; post-processing, costs no privacy.

    Args:
        n_images: Synthetic images, labels uniform over the classes. 60,000 as the paper, section 4.
        steps: DPM-Solver++ steps.
        guidance_scale: Classifier-free guidance scale; 1 is none.
        batch_size: Images denoised together.
        shard_size: Images per Parquet shard (the unit of work and of resuming).
        num_actors: Sampling actors; 0 starts as many as the cluster has room for.
        cpus_per_actor: CPU cores per actor.
        gpus_per_actor: GPUs per actor; may be a fraction.
    """

    n_images: Count = 60_000
    steps: Count = 25
    guidance_scale: Annotated[float, Interval(ge=1)] = 2.0
    batch_size: Count = 50
    shard_size: Count = 100
    num_actors: CountOrZero = 0
    cpus_per_actor: Positive = 1.0
    gpus_per_actor: NotNegative = 0.0
