"""The one home of every number a user can set: its default, unit and allowed range.

One frozen dataclass per stage. YAML keys and command-line flags are the same dotted names
(``privacy.epsilon`` / ``--privacy.epsilon``). Every field is *public* information: sensitive
inputs are arguments of functions, never part of a config.

Defaults are those of the paper's Table 13; where they differ the field says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from sapf_ray.errors import ConfigError

ACCOUNTANTS = ("pld", "rdp")
SCORES = ("per_sample_norm", "noisy_mean_gradient", "random")
DATA_FREE_SCORES = frozenset({"random"})
CLIPPINGS = ("automatic", "flat")
POOLS = ("qkv", "qkvo", "qkv_no_middle", "cross_q")
ADAPTERS = ("lora", "direct", "full")
DTYPES = ("float32", "bfloat16")
CLASSIFIERS = ("cnn", "resnet", "wrn", "resnext")
FID_FEATURES = ("auto", "glyph", "inception")
FID_REFERENCES = ("test", "train")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(name, value, allowed)


def _positive_int(prefix: str, obj: object, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
            f"{prefix}.{name}", value, f"must be an integer of at least {minimum}",
        )


def _above_zero(prefix: str, obj: object, *names: str) -> None:
    for name in names:
        _require(getattr(obj, name) > 0, f"{prefix}.{name}", getattr(obj, name), "must be above 0")


def _not_negative(prefix: str, obj: object, *names: str) -> None:
    for name in names:
        _require(getattr(obj, name) >= 0, f"{prefix}.{name}", getattr(obj, name), "must be at least 0")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, name, value, "must be one of " + ", ".join(allowed))


@dataclass(frozen=True)
class DataConfig:
    """The sensitive images.

    Args:
        source: digits (scikit-learn, embedded), stand_in (public twin of digits), cifar10, octmnist, celeba, camelyon
            (the published files), image_folder (one sub-folder per class) or parquet (as Hugging Face datasets writes it).
        path: Directory or file of the source, see ``sapf datasets``; not used by digits and stand_in.
        n_records: N, number of training records, for planning without data; a run takes N from the data.
        prompt_template: Prompt for sources without prompts of their own (image_folder, parquet); {name} is the class name.
        test_fraction: Share held out as test set by image_folder and parquet where no split is given; in (0, 1).
    """

    source: str = "digits"
    path: str | None = None
    n_records: int | None = None
    prompt_template: str = "An image of {name}"
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.n_records is not None:
            _positive_int("data", self, "n_records", minimum=3)
        _require("{name}" in self.prompt_template, "data.prompt_template", self.prompt_template,
                 "must contain {name}")
        _require(0 < self.test_fraction < 1, "data.test_fraction", self.test_fraction, "must lie in (0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """The public model.

    Args:
        path: A bundled name (glyphs-tiny), a local diffusers directory, or a hub id.
        dtype: Precision of the frozen weights and of forward passes: float32 or bfloat16.
    """

    path: str = "glyphs-tiny"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require(bool(self.path), "model.path", self.path, "must name a bundled model, a directory or a hub id")
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class PrivacyConfig:
    """The budget. Adjacency is add/remove one image.

    Args:
        epsilon: Planned epsilon of the whole run (selection and fine-tuning composed); > 0.
        delta: Planned delta in (0, 1); by default 1 / (N ln N).
        accountant: pld (tight, default) or rdp (as the paper).
        non_private: No noise at all: the ceiling of research comparisons. Epsilon is then infinite and the card says so.
        reproducible_seed: Seeds privacy noise and Poisson draws so that a run can be repeated; NOT for release.
            By default they come from a secret key drawn from the operating system.
    """

    epsilon: float = 10.0
    delta: float | None = None
    accountant: str = "pld"
    non_private: bool = False
    reproducible_seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 < self.epsilon < float("inf"), "privacy.epsilon", self.epsilon, "must be a finite number above 0")
        if self.delta is not None:
            _require(0 < self.delta < 1, "privacy.delta", self.delta, "must lie in (0, 1)")
        _one_of("privacy.accountant", self.accountant, ACCOUNTANTS)


@dataclass(frozen=True)
class SaliencyConfig:
    """Private selection of weight matrices (paper section 3.2).

    Args:
        score: per_sample_norm (default: stands 5-20x more noise, design section 5) or noisy_mean_gradient
            (paper, eqs. 6-8), or random (reads no data, costs no budget).
        pool: Candidate pool: qkv (paper's text), qkvo (with output projections, as the authors' code),
            qkv_no_middle (without the middle block, Table 2) or cross_q (cross-attention queries, Table 6).
        ratio: Share of the pool kept, in (0, 1]; ceil(ratio * K) matrices.
        noise_multiplier: Noise std over sensitivity of the one release. 25 instead of the paper's 5: with the
            per-sample-norm score it costs next to nothing and still ranks well (design section 5).
        sample_rate: Poisson rate of the records that are scored, in (0, 1]; 1 is the full pass.
        clipping: automatic (v / (|v| + gamma)) or flat (paper: clip at clipping_norm).
        clipping_norm: C_s, bound on one record's contribution; > 0.
        clipping_gamma: gamma of automatic clipping, in units of the per-record norm; > 0.
        shard_size: Records per Ray task.
        micro_batch_size: Records per forward/backward pass.
        cpus_per_task: CPU cores one scoring task takes.
        gpus_per_task: GPUs one scoring task takes; may be a fraction.
    """

    score: str = "per_sample_norm"
    pool: str = "qkv"
    ratio: float = 0.3
    noise_multiplier: float = 25.0
    sample_rate: float = 1.0
    clipping: str = "automatic"
    clipping_norm: float = 1.0
    clipping_gamma: float = 1e-4
    shard_size: int = 512
    micro_batch_size: int = 64
    cpus_per_task: float = 1.0
    gpus_per_task: float = 0.0

    def __post_init__(self) -> None:
        _one_of("saliency.score", self.score, SCORES)
        _one_of("saliency.pool", self.pool, POOLS)
        _require(0 < self.ratio <= 1, "saliency.ratio", self.ratio, "must lie in (0, 1]")
        _above_zero("saliency", self, "noise_multiplier")
        _require(0 < self.sample_rate <= 1, "saliency.sample_rate", self.sample_rate, "must lie in (0, 1]")
        _one_of("saliency.clipping", self.clipping, CLIPPINGS)
        _above_zero("saliency", self, "clipping_norm", "clipping_gamma", "cpus_per_task")
        _not_negative("saliency", self, "gpus_per_task")
        _positive_int("saliency", self, "shard_size", "micro_batch_size")


@dataclass(frozen=True)
class FinetuneConfig:
    """DP-SGD on LoRA factors of the selected matrices (paper section 3.3).

    Args:
        steps: Optimizer steps; 0 leaves the public model as it is and reads no sensitive image.
        batch_size: Expected batch size B; the Poisson sample rate is B / N.
        micro_batch_size: Records per forward/backward pass on one worker (memory and speed only; no effect on the
            result); 0 finds it on random data when training starts.
        adapter: lora (factors on the selected matrices), direct (the selected matrices themselves) or full (all
            weights of the denoiser; wants saliency.ratio 1). The latter two train in float32 whatever model.dtype.
        lora_rank: r of the LoRA factors.
        train_lora_a: Train both factors; False freezes the Gaussian A and trains B only (FFA-LoRA, Sun et al. 2024).
        learning_rate: AdamW step size. 5e-4 is the authors' code; Table 13 does not give it.
        weight_decay: AdamW decoupled weight decay.
        clipping: automatic (g / (|g| + gamma), Bu et al. 2023) or flat (paper's text; design section 5 tells
            why C = 1 flat trains so much worse).
        clipping_norm: C, bound on one record's gradient; > 0.
        clipping_gamma: gamma of automatic clipping, in units of the per-record gradient norm; > 0.
        draws_per_record: Noise/timestep draws averaged within a record before clipping (augmentation
            multiplicity, De et al. 2022); costs compute, no privacy.
        ema_decay: Decay of the exponential moving average of the adapter that is released, in [0, 1); 0 releases
            the last iterate. Post-processing, costs no privacy.
        checkpoint_every: Steps between Ray Train checkpoints.
        max_failures: Worker-group restarts that Ray Train makes by itself.
        num_workers: Ray Train workers.
        cpus_per_worker: CPU cores per worker; 0 shares the cluster's cores among the workers.
        gpus_per_worker: GPUs per worker; 0 trains on CPU.
    """

    steps: int = 1000
    batch_size: int = 4096
    micro_batch_size: int = 0
    adapter: str = "lora"
    lora_rank: int = 4
    train_lora_a: bool = True
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    clipping: str = "automatic"
    clipping_norm: float = 1.0
    clipping_gamma: float = 1e-3
    draws_per_record: int = 1
    ema_decay: float = 0.0
    checkpoint_every: int = 50
    max_failures: int = 3
    num_workers: int = 1
    cpus_per_worker: float = 0.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        _positive_int("finetune", self, "steps", "max_failures", "micro_batch_size", minimum=0)
        _positive_int("finetune", self, "batch_size", "lora_rank", "draws_per_record",
                      "checkpoint_every", "num_workers")
        _above_zero("finetune", self, "learning_rate", "clipping_norm", "clipping_gamma")
        _not_negative("finetune", self, "weight_decay", "cpus_per_worker", "gpus_per_worker")
        _one_of("finetune.adapter", self.adapter, ADAPTERS)
        _one_of("finetune.clipping", self.clipping, CLIPPINGS)
        _require(0 <= self.ema_decay < 1, "finetune.ema_decay", self.ema_decay, "must lie in [0, 1)")


@dataclass(frozen=True)
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
        _positive_int("synthesis", self, "n_images", "steps", "batch_size", "shard_size")
        _positive_int("synthesis", self, "num_actors", minimum=0)
        _require(self.guidance_scale >= 1, "synthesis.guidance_scale", self.guidance_scale, "must be at least 1")
        _above_zero("synthesis", self, "cpus_per_actor")
        _not_negative("synthesis", self, "gpus_per_actor")


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores against the real test images: a non-private measurement of research runs.

    Args:
        enabled: False for a release run: the test images are then never read.
        fid_features: auto (Inception where weights are given, else glyph), glyph (reported as fid_glyph) or inception.
        inception_weights: Path of torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth).
        fid_reference: Real images that FID compares with: test, or train (as DPImageBench).
        cache_dir: Where Inception features of the real images are kept (mode 0700, as sensitive as the images) for
            the next run on the same images; by default nowhere.
        classifiers: Downstream classifiers whose accuracies are averaged: cnn, resnet, wrn, resnext.
        epochs: Epochs of a downstream classifier.
        batch_size: Images per classifier step.
        learning_rate: Peak step size of the classifier's AdamW one-cycle schedule.
        cpus_per_task: CPU cores of each of the Ray tasks: one for FID, one per classifier; 0 takes a node's cores.
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
        _one_of("evaluation.fid_features", self.fid_features, FID_FEATURES)
        _require(self.fid_features != "inception" or self.inception_weights is not None,
                 "evaluation.inception_weights", self.inception_weights, "must be a path when fid_features is inception")
        _one_of("evaluation.fid_reference", self.fid_reference, FID_REFERENCES)
        _require(len(self.classifiers) > 0, "evaluation.classifiers", self.classifiers, "must name at least one")
        for name in self.classifiers:
            _one_of("evaluation.classifiers", name, CLASSIFIERS)
        _positive_int("evaluation", self, "epochs", "batch_size")
        _above_zero("evaluation", self, "learning_rate")
        _not_negative("evaluation", self, "cpus_per_task", "gpus_per_task")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow.

    Args:
        enabled: Log the run to MLflow.
        uri: Tracking URI; by default MLFLOW_TRACKING_URI, else a sqlite file beside the run directory.
        experiment: MLflow experiment name.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "sapf"


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs.

    Args:
        address: Ray address (auto, ray://host:10001, host:6379); by default a local Ray is started.
        num_cpus: Cores of the local Ray; by default all of the machine.
        keep_cache: Keep the sensitive latent cache after the run (mode 0600); by default it is deleted.
    """

    address: str | None = None
    num_cpus: int | None = None
    keep_cache: bool = False

    def __post_init__(self) -> None:
        if self.num_cpus is not None:
            _positive_int("cluster", self, "num_cpus")


@dataclass(frozen=True)
class RunConfig:
    """One run. ``seed`` seeds everything that is not privacy noise: LoRA init, sampling prompts, classifiers."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "must be at least 0")
        _require(self.finetune.adapter != "full" or self.saliency.ratio == 1, "saliency.ratio", self.saliency.ratio,
                 "must be 1 where finetune.adapter is full: all weights are trained, none is selected")


# How the work is spread, watched and retried: may differ between two starts of the same run.
EXECUTION_ONLY = frozenset({
    "saliency.cpus_per_task", "saliency.gpus_per_task",
    "finetune.num_workers", "finetune.cpus_per_worker", "finetune.gpus_per_worker", "finetune.max_failures",
    "finetune.checkpoint_every",
    "synthesis.num_actors", "synthesis.cpus_per_actor", "synthesis.gpus_per_actor",
    "evaluation.cpus_per_task", "evaluation.gpus_per_task", "evaluation.cache_dir",
    "tracking.enabled", "tracking.uri", "tracking.experiment",
    "cluster.address", "cluster.num_cpus", "cluster.keep_cache",
    "data.n_records",
})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)


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
        _require(key in sections, key, value, "unknown key; allowed: " + ", ".join(sections))
        default = sections[key].default_factory
        if default is dataclasses.MISSING:
            kwargs[key] = value
            continue
        _require(isinstance(value, dict), key, value, "must be a mapping")
        known = {f.name for f in dataclasses.fields(default)}  # type: ignore[arg-type]
        for name in value:
            _require(name in known, f"{key}.{name}", value[name], "unknown key; allowed: " + ", ".join(sorted(known)))
        kwargs[key] = default(**value)
    return RunConfig(**kwargs)


def result_keys(config: RunConfig) -> dict[str, Any]:
    """The flat config without what only says how the work is spread."""
    return {k: v for k, v in flatten(to_dict(config)).items() if k not in EXECUTION_ONLY}


def config_hash(config: RunConfig, *sections: str) -> str:
    """Hex digest over the result-bearing keys of the named sections (all when none is named)."""
    keys = {k: v for k, v in result_keys(config).items() if not sections or k.split(".")[0] in sections}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
