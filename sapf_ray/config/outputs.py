"""The stages after the last use of the budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapf_ray.config.checks import above_zero, not_negative, one_of, positive_int, require

CLASSIFIERS = ("cnn", "resnet", "wrn", "resnext")
FID_FEATURES = ("auto", "glyph", "inception")
FID_REFERENCES = ("test", "train")


@dataclass(frozen=True, kw_only=True)
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

    n_images: int = 60_000
    steps: int = 25
    guidance_scale: float = 2.0
    batch_size: int = 50
    shard_size: int = 100
    num_actors: int = 0
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0

    def __post_init__(self) -> None:
        positive_int("synthesis", self, "n_images", "steps", "batch_size", "shard_size")
        positive_int("synthesis", self, "num_actors", minimum=0)
        require(
            self.guidance_scale >= 1,
            "synthesis.guidance_scale",
            self.guidance_scale,
            "must be at least 1",
        )
        above_zero("synthesis", self, "cpus_per_actor")
        not_negative("synthesis", self, "gpus_per_actor")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores against the real test images: a non-private measurement of research runs.

    Args:
        enabled: False for a release run: the test images are then never read.
        fid_features: auto (Inception where weights are given, else glyph), glyph (reported as
            fid_glyph) or inception.
        inception_weights: Path of torch-fidelity's Inception weights
            (weights-inception-2015-12-05-6726825d.pth).
        fid_reference: Real images that FID compares with: test, or train (as DPImageBench).
        cache_dir: Where Inception features of the real images are kept (mode 0700, as sensitive as
            the images) for the next run on the same images; by default nowhere.
        classifiers: Downstream classifiers whose accuracies are averaged: cnn, resnet, wrn,
            resnext.
        epochs: Epochs of a downstream classifier.
        batch_size: Images per classifier step.
        learning_rate: Peak step size of the classifier's AdamW one-cycle schedule.
        cpus_per_task: CPU cores of each of the Ray tasks: one for FID, one per classifier; 0 takes
            a node's cores.
        gpus_per_task: GPUs of each; may be a fraction.
    """

    enabled: bool = True
    fid_features: str = "auto"
    inception_weights: str | None = None
    fid_reference: str = "test"
    cache_dir: str | None = None
    classifiers: list[str] = field(default_factory=lambda: ["cnn"])
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    cpus_per_task: float = 0.0
    gpus_per_task: float = 0.0

    def __post_init__(self) -> None:
        one_of("evaluation.fid_features", self.fid_features, allowed=FID_FEATURES)
        require(
            self.fid_features != "inception" or self.inception_weights is not None,
            "evaluation.inception_weights",
            self.inception_weights,
            "must be a path when fid_features is inception",
        )
        one_of("evaluation.fid_reference", self.fid_reference, allowed=FID_REFERENCES)
        require(
            len(self.classifiers) > 0,
            "evaluation.classifiers",
            self.classifiers,
            "must name at least one",
        )
        for name in self.classifiers:
            one_of("evaluation.classifiers", name, allowed=CLASSIFIERS)
        positive_int("evaluation", self, "epochs", "batch_size")
        above_zero("evaluation", self, "learning_rate")
        not_negative("evaluation", self, "cpus_per_task", "gpus_per_task")
