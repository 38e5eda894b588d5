"""The whole config of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from sapf_ray.config.audit import AuditConfig
from sapf_ray.config.cluster import ClusterConfig
from sapf_ray.config.data import DataConfig
from sapf_ray.config.evaluation import EvaluationConfig
from sapf_ray.config.evolution import EvolutionConfig
from sapf_ray.config.finetune import FinetuneConfig
from sapf_ray.config.grounding import GroundingConfig
from sapf_ray.config.kinds import CountOrZero, FromList
from sapf_ray.config.model import ModelConfig
from sapf_ray.config.privacy import PrivacyConfig
from sapf_ray.config.saliency import SaliencyConfig
from sapf_ray.config.section import require, section
from sapf_ray.config.synthesis import SynthesisConfig
from sapf_ray.config.tracking import TrackingConfig
from sapf_ray.config.tuning import TuningConfig


@section("")
class RunConfig:
    """One run.

    Args:
        seed: Seeds everything that is not privacy noise: LoRA init, sampling prompts, classifiers.
        plugins: Modules that are imported first, here and in every worker process, so that their
            data sources, scores and other rows can be named (:mod:`sapf_ray.registry`).
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    seed: CountOrZero = 0
    plugins: Annotated[tuple[str, ...], FromList] = ()

    def __post_init__(self) -> None:
        require(
            self.finetune.adapter != "full" or self.saliency.ratio == 1,
            "saliency.ratio",
            self.saliency.ratio,
            "must be 1 where finetune.adapter is full: all weights are trained, none is selected",
        )
        require(
            self.audit.images == 0 or self.data.groups is None,
            "audit.images",
            self.audit.images,
            "must be 0 where data.groups is given: a crafted image has no group",
        )
        require(
            not self.evolution.enabled or self.grounding.remedies in ("auto", "none"),
            "grounding.remedies",
            self.grounding.remedies,
            "must be none or auto where evolution.enabled is true",
        )
        require(
            "tokens" not in self.grounding.named
            or (self.finetune.adapter == "lora" and self.finetune.steps > 0),
            "grounding.remedies",
            self.grounding.remedies,
            "must not name tokens, unless finetune.adapter is lora and finetune.steps above 0: "
            "they are trained with its factors",
        )
        require(
            not self.evolution.enabled or self.finetune.steps == 0,
            "finetune.steps",
            self.finetune.steps,
            "must be 0 where evolution.enabled is true: an evolution trains nothing",
        )
        require(
            self.audit.images == 0 or self.data.groups is None,
            "audit.images",
            self.audit.images,
            "must be 0 where data.groups is given: a crafted image is no group",
        )
        for name, unset in (("class_proportions", ()), ("seed", None), ("resolution", None)):
            value = getattr(self.synthesis, name)
            require(
                not self.evolution.enabled or value == unset,
                f"synthesis.{name}",
                value,
                "must not be given where evolution.enabled is true: images evolve as they are",
            )

    @property
    def image_seed(self) -> int:
        """Seed of the synthetic images."""
        return self.seed if self.synthesis.seed is None else self.synthesis.seed


# Sections that are used after the last release, so they can change when a run is over.
AFTERWARDS = frozenset({"synthesis", "evaluation"})

# Keys of later versions: counted where they are given only, so that a run of an earlier version is
# still known by its keys and hashes.
NOT_COUNTED_WHEN_UNSET: Mapping[str, Any] = {
    "audit.canaries": 0,
    "audit.images": 0,
    "data.groups": None,
    "data.max_images_per_group": None,
    "data.n_records": None,
    "data.resolution": None,
    "evaluation.protocol": "quick",
    "evaluation.resolution": None,
    "evaluation.scores": [],
    "model.configs": None,
    "model.prediction_type": None,
    "model.resolution": None,
    "model.revision": None,
    "model.variant": None,
    "privacy.allow_large_delta": False,
    "saliency.draws_per_record": 1,
    "tuning.private": False,
    "tuning.mean_trials": 10.0,
    "tuning.distribution": "negative_binomial",
    "tuning.shape": 1.0,
    "tuning.held_out": 0.1,
    "tuning.score_share": 0.1,
}
"""Key to the value that asks for nothing new."""

# How the work is spread, watched and retried: may differ between two starts of the same run.
EXECUTION_ONLY = frozenset(
    {
        "grounding.cache_dir",
        "saliency.cpus_per_task",
        "saliency.gpus_per_task",
        "finetune.num_workers",
        "finetune.cpus_per_worker",
        "finetune.gpus_per_worker",
        "finetune.max_failures",
        "finetune.checkpoint_every",
        "evolution.cpus_per_task",
        "evolution.gpus_per_task",
        "synthesis.num_actors",
        "synthesis.cpus_per_actor",
        "synthesis.gpus_per_actor",
        "evaluation.cpus_per_task",
        "evaluation.gpus_per_task",
        "evaluation.cache_dir",
        "tracking.enabled",
        "tracking.uri",
        "tracking.experiment",
        "tracking.parent_run_id",
        "cluster.address",
        "cluster.num_cpus",
        "cluster.keep_cache",
        "cluster.storage",
        "cluster.publish_not_private",
        "cluster.latents_dir",
        "cluster.images_secret",
        "cluster.selection_dir",
        "audit.confidence",
        "audit.mechanism_runs",
        "tuning.split",
        "plugins",
    }
)
