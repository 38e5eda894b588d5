"""Sampling the synthetic data set."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from sapf_ray.config.kinds import AutoGpus, Count, CountOrZero, FromList, NotNegative, Positive
from sapf_ray.config.section import require, section


@section("synthesis")
class SynthesisConfig:
    """Sampling the synthetic data set; post-processing, costs no privacy.

    Args:
        n_images: Synthetic images. 60,000 as the paper, section 4.
        class_proportions: Weight of each class, in the order of the labels (3,1: three quarters of
            the images are of the first); by default all classes are equally frequent. Must be
            public knowledge: counts of the sensitive images are not.
        seed: Seed of the images; null: the run's seed.
        resolution: Side of the images in pixels; null: model.resolution. Another one is a size that
            the adapter was not trained at.
        steps: DPM-Solver++ steps.
        guidance_scale: Classifier-free guidance scale; 1 is none.
        batch_size: Images denoised together.
        shard_size: Images per Parquet shard (the unit of work and of resuming).
        num_actors: Sampling actors; 0 starts as many as the cluster has room for.
        cpus_per_actor: CPU cores per actor.
        gpus_per_actor: GPUs per actor, a fraction too; ``auto`` is 1 where there are any, a half
            where two models fit into one's memory.
    """

    n_images: Count = 60_000
    class_proportions: Annotated[tuple[NotNegative, ...], FromList] = ()
    seed: CountOrZero | None = None
    resolution: Count | None = None
    steps: Count = 25
    guidance_scale: Annotated[float, Interval(ge=1)] = 2.0
    batch_size: Count = 50
    shard_size: Count = 100
    num_actors: CountOrZero = 0
    cpus_per_actor: Positive = 1.0
    gpus_per_actor: AutoGpus = None

    @property
    def gpus(self) -> float:
        """GPUs of an actor; 0 while ``auto`` is not placed (:mod:`sapf_ray.placement`)."""
        return self.gpus_per_actor or 0.0

    def __post_init__(self) -> None:
        require(
            not self.class_proportions or sum(self.class_proportions) > 0,
            "synthesis.class_proportions",
            list(self.class_proportions),
            "must hold a weight above 0",
        )

    def side(self, model: int) -> int:
        """Side of the images in pixels, of a model that makes images of ``model`` pixels."""
        return self.resolution or model

    def check_classes(self, n_classes: int) -> None:
        """Whether the proportions are those of a data set's classes.

        Raises:
            ConfigError: There are more or fewer of them than classes.
        """
        require(
            len(self.class_proportions) in (0, n_classes),
            "synthesis.class_proportions",
            list(self.class_proportions),
            f"must be {n_classes} weights, one for each class",
        )
