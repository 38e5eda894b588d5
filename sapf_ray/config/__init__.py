"""The one home of every number a user can set: its default, unit and allowed range.

One frozen dataclass per stage. YAML keys and command-line flags are the same dotted names
(``privacy.epsilon`` / ``--privacy.epsilon``). Every field is *public* information: sensitive
inputs are arguments of functions, never part of a config.

Defaults are those of the paper's Table 13; where they differ the field says why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sapf_ray.config.checks import require
from sapf_ray.config.evolving import EVOLUTION_EMBEDDINGS, EVOLUTION_SELECTIONS, EvolutionConfig
from sapf_ray.config.inputs import ACCOUNTANTS, DTYPES, DataConfig, ModelConfig, PrivacyConfig
from sapf_ray.config.learning import (
    ADAPTERS,
    CLIPPINGS,
    DATA_FREE_SCORES,
    GRANULARITIES,
    ITERATIVE_SCORES,
    MECHANISMS,
    PER_MATRIX_SCORES,
    POOLS,
    SCORES,
    FinetuneConfig,
    SaliencyConfig,
)
from sapf_ray.config.outputs import (
    CLASSIFIERS,
    FID_FEATURES,
    FID_REFERENCES,
    EvaluationConfig,
    SynthesisConfig,
)
from sapf_ray.config.running import ClusterConfig, TrackingConfig
from sapf_ray.files import short_hash

__all__ = [
    "ACCOUNTANTS",
    "ADAPTERS",
    "CLASSIFIERS",
    "CLIPPINGS",
    "DATA_FREE_SCORES",
    "DTYPES",
    "EVOLUTION_EMBEDDINGS",
    "EVOLUTION_SELECTIONS",
    "EXECUTION_ONLY",
    "FID_FEATURES",
    "FID_REFERENCES",
    "GRANULARITIES",
    "ITERATIVE_SCORES",
    "MECHANISMS",
    "PER_MATRIX_SCORES",
    "POOLS",
    "SCORES",
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvolutionConfig",
    "FinetuneConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "SaliencyConfig",
    "SynthesisConfig",
    "TrackingConfig",
    "config_hash",
    "flatten",
    "from_dict",
    "result_keys",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. ``seed`` seeds everything that is not privacy noise: LoRA init, sampling prompts,
    classifiers.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "must be at least 0")
        require(
            self.finetune.adapter != "full" or self.saliency.ratio == 1,
            "saliency.ratio",
            self.saliency.ratio,
            "must be 1 where finetune.adapter is full: all weights are trained, none is selected",
        )
        require(
            not self.evolution.enabled or self.finetune.steps == 0,
            "finetune.steps",
            self.finetune.steps,
            "must be 0 where evolution.enabled is true: an evolution trains nothing",
        )


# How the work is spread, watched and retried: may differ between two starts of the same run.
EXECUTION_ONLY = frozenset(
    {
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
        "cluster.latents_dir",
        "cluster.selection_dir",
        "data.n_records",
    }
)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(
        config,
        dict_factory=lambda items: {
            key: list(value) if isinstance(value, tuple) else value for key, value in items
        },
    )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"privacy": {"epsilon": 1}}`` → ``{"privacy.epsilon": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + ".") if isinstance(value, dict) else {name: value})
    return flat


def from_dict(nested: dict[str, Any]) -> RunConfig:
    """Builds and validates a :class:`RunConfig` from nested dicts.

    Raises:
        ConfigError: Unknown key, or a value outside its range; names the dotted key.
    """
    kwargs: dict[str, Any] = {}
    sections = {f.name: f for f in dataclasses.fields(RunConfig)}
    for key, value in nested.items():
        require(key in sections, key, value, "unknown key; allowed: " + ", ".join(sections))
        default = sections[key].default_factory
        if default is dataclasses.MISSING:
            kwargs[key] = value
            continue
        require(isinstance(value, dict), key, value, "must be a mapping")
        known = {f.name for f in dataclasses.fields(default)}  # type: ignore[arg-type]
        for name in value:
            require(
                name in known,
                f"{key}.{name}",
                value[name],
                "unknown key; allowed: " + ", ".join(sorted(known)),
            )
        kwargs[key] = default(**value)
    return RunConfig(**kwargs)


def result_keys(config: RunConfig) -> dict[str, Any]:
    """The flat config without what only says how the work is spread."""
    return {k: v for k, v in flatten(to_dict(config)).items() if k not in EXECUTION_ONLY}


def config_hash(config: RunConfig, *sections: str) -> str:
    """Hex digest over the result-bearing keys of the named sections (all when none is named)."""
    keys = {
        k: v for k, v in result_keys(config).items() if not sections or k.split(".")[0] in sections
    }
    return short_hash(keys)
