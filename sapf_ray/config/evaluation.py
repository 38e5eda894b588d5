"""Scores against real images, after the last use of the budget."""

from __future__ import annotations

from typing import Annotated, Literal

from sapf_ray.config.kinds import AutoGpus, Count, FromList, NameIn, NotNegative, Positive
from sapf_ray.config.section import require, section

ScoreName = Annotated[str, NameIn("evaluation.scores")]
ClassifierName = Annotated[str, NameIn("evaluation.classifiers")]


@section("evaluation")
class EvaluationConfig:
    """Scores against real images: a non-private measurement of research runs.

    Args:
        enabled: False for a release run: no real image is then read for a score, and no test image
            at all.
        protocol: quick (minutes; the keys below say how), or dpimagebench: classifiers, their
            training and FID as the benchmark and the paper's tables have them, whatever epochs,
            batch_size and learning_rate say.
        scores: Beside FID and accuracy, in the same features: kid, precision_recall,
            inception_score, fid_per_class.
        fid_features: auto (Inception where weights are given, else glyph), glyph (reported as
            fid_glyph) or inception.
        inception_weights: Path of torch-fidelity's Inception weights
            (weights-inception-2015-12-05-6726825d.pth).
        fid_reference: Real images that FID compares with: test, or train (as DPImageBench).
        test_images: Of the real images, split (the source's test split), or all, where `sapf
            evaluate` has a test set of its own that no run was trained on.
        resolution: Side in pixels at which images are compared, at most that of the synthetic ones;
            null: the data set's own side (`sapf datasets`, or data.resolution), or theirs where it
            is smaller.
        cache_dir: Where Inception features of the real images and the judge are kept (mode 0700, as
            sensitive as the images) for the next run on the same images; by default nowhere.
        classifiers: Downstream classifiers whose accuracies are averaged: cnn, resnet, wrn,
            resnext.
        judge: Classifier of conditional fidelity, one of the same: it learns from the real training
            images and tells what share of the synthetic images show the class that they are
            labelled with.
        judge_epochs: Its epochs, at least 100 steps.
        epochs: Epochs of a downstream classifier.
        batch_size: Images per classifier step.
        learning_rate: Peak step size of the classifier's AdamW one-cycle schedule.
        cpus_per_task: CPU cores of each of the Ray tasks: one for FID, one per classifier, one for
            the judge; 0 takes a node's cores.
        gpus_per_task: GPUs of each, a fraction too; ``auto`` is 1 where there are any.
    """

    enabled: bool = True
    protocol: Annotated[str, NameIn("evaluation.protocol")] = "quick"
    scores: Annotated[tuple[ScoreName, ...], FromList] = ()
    fid_features: Annotated[str, NameIn("evaluation.fid_features")] = "auto"
    inception_weights: str | None = None
    fid_reference: Literal["test", "train"] = "test"
    test_images: Literal["split", "all"] = "split"
    resolution: Count | None = None
    cache_dir: str | None = None
    classifiers: Annotated[tuple[ClassifierName, ...], FromList] = ("cnn",)
    judge: ClassifierName = "cnn"
    judge_epochs: Count = 6
    epochs: Count = 20
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    cpus_per_task: NotNegative = 0.0
    gpus_per_task: AutoGpus = None

    @property
    def gpus(self) -> float:
        """GPUs of a task; 0 while ``auto`` is not placed (:mod:`sapf_ray.placement`)."""
        return self.gpus_per_task or 0.0

    def compared_at(self, native: int | None, made: int) -> int:
        """Side in pixels at which real and synthetic images are compared.

        Never larger than the synthetic images unless asked for: enlarged, they would be compared by
        their blur.

        Args:
            native: Of the real images, where it is known.
            made: Of the synthetic images.
        """
        return self.resolution or min(native or made, made)

    def __post_init__(self) -> None:
        require(
            self.test_images == "split" or self.fid_reference == "test",
            "evaluation.fid_reference",
            self.fid_reference,
            "must be test where evaluation.test_images is all: no training images are left",
        )
        require(
            self.fid_features != "inception" or self.inception_weights is not None,
            "evaluation.inception_weights",
            self.inception_weights,
            "must be a path when fid_features is inception",
        )
        require(
            len(self.classifiers) > 0,
            "evaluation.classifiers",
            list(self.classifiers),
            "must name at least one",
        )
