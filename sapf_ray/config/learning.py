"""The stages that read sensitive images."""

from __future__ import annotations

from dataclasses import dataclass

from sapf_ray.config.checks import above_zero, not_negative, one_of, positive_int, require

SCORES = ("per_sample_norm", "noisy_mean_gradient", "snip", "force", "synflow", "random")
DATA_FREE_SCORES = frozenset({"synflow", "random"})
ITERATIVE_SCORES = frozenset({"force"})  # several releases
PER_MATRIX_SCORES = (
    "per_sample_norm",
    "snip",
)  # one release of one non-negative number a matrix and record
MECHANISMS = ("gaussian", "exponential", "propose_test_release")
GRANULARITIES = ("matrix", "layer")
CLIPPINGS = ("automatic", "flat")
POOLS = ("qkv", "qkvo", "qkv_no_middle", "cross_q", "all")
ADAPTERS = ("lora", "direct", "full")


@dataclass(frozen=True, kw_only=True)
class SaliencyConfig:
    """Private selection of weight matrices (paper section 3.2).

    Args:
        score: per_sample_norm (default: stands 5-20x more noise, design section 5) or
            noisy_mean_gradient (paper, eqs. 6-8); snip, force (several releases) or synflow (reads
            no data, costs no budget) of Table 15 (sapf_ray/saliency/scores.py); or random (reads no
            data, costs no budget).
        mechanism: gaussian (paper), exponential or propose_test_release (Figure 6;
            sapf_ray/saliency/mechanisms.py); the latter two want score per_sample_norm or snip,
            granularity matrix and sample_rate 1.
        granularity: What is kept: single matrices, or whole layers (Layer-Level, Figure 4).
        pool: Candidate pool: qkv (paper's text), qkvo (with output projections, as the authors'
            code), qkv_no_middle (without the middle block, Table 2), cross_q (cross-attention
            queries, Table 6) or all (every linear layer and convolution of the denoiser, Figure 4).
        ratio: Share of the pool kept, in (0, 1]; ceil(ratio * K) matrices, or whole layers that
            hold as many.
        noise_multiplier: Noise std over sensitivity of each release. 25 instead of the paper's 5:
            with the per-sample-norm score it costs next to nothing and still ranks well (design
            section 5). The exponential mechanism's draws together cost what a Gaussian release with
            this noise costs; of propose_test_release it is 1 / epsilon of the test.
        rounds: Steps of force (each a release) and of synflow, at least 1; 5 as Table 15's hours
            say of force.
        delta_share: Share of the run's delta that propose_test_release spends, in (0, 1).
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
    mechanism: str = "gaussian"
    granularity: str = "matrix"
    noise_multiplier: float = 25.0
    rounds: int = 5
    delta_share: float = 0.1
    sample_rate: float = 1.0
    clipping: str = "automatic"
    clipping_norm: float = 1.0
    clipping_gamma: float = 1e-4
    shard_size: int = 512
    micro_batch_size: int = 64
    cpus_per_task: float = 1.0
    gpus_per_task: float = 0.0

    def __post_init__(self) -> None:
        one_of("saliency.score", self.score, allowed=SCORES)
        one_of("saliency.pool", self.pool, allowed=POOLS)
        one_of("saliency.mechanism", self.mechanism, allowed=MECHANISMS)
        one_of("saliency.granularity", self.granularity, allowed=GRANULARITIES)
        require(0 < self.ratio <= 1, "saliency.ratio", self.ratio, "must lie in (0, 1]")
        above_zero("saliency", self, "noise_multiplier")
        require(
            0 < self.sample_rate <= 1,
            "saliency.sample_rate",
            self.sample_rate,
            "must lie in (0, 1]",
        )
        one_of("saliency.clipping", self.clipping, allowed=CLIPPINGS)
        above_zero("saliency", self, "clipping_norm", "clipping_gamma", "cpus_per_task")
        not_negative("saliency", self, "gpus_per_task")
        positive_int("saliency", self, "shard_size", "micro_batch_size", "rounds")
        require(
            0 < self.delta_share < 1, "saliency.delta_share", self.delta_share, "must lie in (0, 1)"
        )
        if self.mechanism != "gaussian":
            why = f"where saliency.mechanism is {self.mechanism}"
            require(
                self.score in PER_MATRIX_SCORES,
                "saliency.score",
                self.score,
                f"must be {' or '.join(PER_MATRIX_SCORES)} {why}: it draws from one number a matrix",
            )
            require(
                self.granularity == "matrix",
                "saliency.granularity",
                self.granularity,
                f"must be matrix {why}",
            )
            require(
                self.sample_rate == 1,
                "saliency.sample_rate",
                self.sample_rate,
                f"must be 1 {why}: its accounting has no sampling",
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """DP-SGD on LoRA factors of the selected matrices (paper section 3.3).

    Args:
        steps: Optimizer steps; 0 leaves the public model as it is and reads no sensitive image.
        batch_size: Expected batch size B; the Poisson sample rate is B / N.
        micro_batch_size: Records per forward/backward pass on one worker (memory and speed only; no
            effect on the result); 0 finds it on random data when training starts.
        adapter: lora (factors on the selected matrices), direct (the selected matrices themselves)
            or full (all weights of the denoiser; wants saliency.ratio 1). The latter two train in
            float32 whatever model.dtype.
        randomize: none, or a pool (saliency.pool) whose matrices that are not trained get random
            values before training starts (Noisy, Figure 4): normal with the matrix's own mean and
            standard deviation, from the public seed.
        lora_rank: r of the LoRA factors.
        train_lora_a: Train both factors; False freezes the Gaussian A and trains B only (FFA-LoRA,
            Sun et al. 2024).
        learning_rate: AdamW step size. 5e-4 is the authors' code; Table 13 does not give it.
        weight_decay: AdamW decoupled weight decay.
        clipping: automatic (g / (|g| + gamma), Bu et al. 2023) or flat (paper's text; design
            section 5 tells why C = 1 flat trains so much worse).
        clipping_norm: C, bound on one record's gradient; > 0.
        clipping_gamma: gamma of automatic clipping, in units of the per-record gradient norm; > 0.
        draws_per_record: Noise/timestep draws averaged within a record before clipping
            (augmentation multiplicity, De et al. 2022); costs compute, no privacy.
        timestep_start: Cleanest diffusion time trained on, as a share of the whole diffusion, in
            [0, 1); 0 as the paper.
        timestep_end: Noisiest, in (timestep_start, 1]; 1 as the paper. Every record's gradient is
            scaled to the same bound, so times that say little about an image (nearly clean, nearly
            pure noise) cost as much of the signal as those that matter; leaving them out is public
            and free (cf. Dockhorn et al. 2023, section 4).
        ema_decay: Decay of the exponential moving average of the adapter that is released, in [0,
            1); 0 releases the last iterate. Post-processing, costs no privacy.
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
    randomize: str = "none"
    lora_rank: int = 4
    train_lora_a: bool = True
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    clipping: str = "automatic"
    clipping_norm: float = 1.0
    clipping_gamma: float = 1e-3
    draws_per_record: int = 1
    timestep_start: float = 0.0
    timestep_end: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 50
    max_failures: int = 3
    num_workers: int = 1
    cpus_per_worker: float = 0.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        positive_int("finetune", self, "steps", "max_failures", "micro_batch_size", minimum=0)
        positive_int(
            "finetune",
            self,
            "batch_size",
            "lora_rank",
            "draws_per_record",
            "checkpoint_every",
            "num_workers",
        )
        above_zero("finetune", self, "learning_rate", "clipping_norm", "clipping_gamma")
        not_negative("finetune", self, "weight_decay", "cpus_per_worker", "gpus_per_worker")
        one_of("finetune.adapter", self.adapter, allowed=ADAPTERS)
        one_of("finetune.randomize", self.randomize, allowed=("none", *POOLS))
        require(
            self.adapter != "full" or self.randomize == "none",
            "finetune.randomize",
            self.randomize,
            "must be none where finetune.adapter is full: no matrix is left untrained",
        )
        one_of("finetune.clipping", self.clipping, allowed=CLIPPINGS)
        require(
            0 <= self.timestep_start < 1,
            "finetune.timestep_start",
            self.timestep_start,
            "must lie in [0, 1)",
        )
        require(
            self.timestep_start < self.timestep_end <= 1,
            "finetune.timestep_end",
            self.timestep_end,
            f"must lie in ({self.timestep_start:g}, 1], above timestep_start",
        )
        require(0 <= self.ema_decay < 1, "finetune.ema_decay", self.ema_decay, "must lie in [0, 1)")
