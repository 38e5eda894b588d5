"""Private fine-tuning."""

from __future__ import annotations

from typing import Literal

from sapf_ray.config.kinds import (
    AutoCount,
    AutoGpus,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
)
from sapf_ray.config.section import require, section


@section("finetune")
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
        clipping_norm: C, bound on one record's gradient.
        clipping_gamma: gamma of automatic clipping, in units of the per-record gradient norm.
        draws_per_record: Noise/timestep draws averaged within a record before clipping
            (augmentation multiplicity, De et al. 2022); costs compute, no privacy.
        timestep_start: Cleanest diffusion time trained on, as a share of the whole diffusion; 0
            as the paper.
        timestep_end: Noisiest, above timestep_start; 1 as the paper. Every record's gradient is
            scaled to the same bound, so times that say little about an image (nearly clean, nearly
            pure noise) cost as much of the signal as those that matter; leaving them out is public
            and free (cf. Dockhorn et al. 2023, section 4).
        ema_decay: Decay of the exponential moving average of the adapter that is released;
            0 releases the last iterate. Post-processing, costs no privacy.
        checkpoint_every: Steps between Ray Train checkpoints.
        max_failures: Worker-group restarts that Ray Train makes by itself.
        num_workers: Ray Train workers; ``auto`` is one for each GPU of the cluster, else one.
        cpus_per_worker: CPU cores per worker; 0 shares the cluster's cores among the workers.
        gpus_per_worker: GPUs per worker; 0 trains on CPU; ``auto`` is 1 where there are any.
    """

    steps: CountOrZero = 1000
    batch_size: Count = 4096
    micro_batch_size: CountOrZero = 0
    adapter: Literal["lora", "direct", "full"] = "lora"
    randomize: Literal["none", "qkv", "qkvo", "qkv_no_middle", "cross_q", "all"] = "none"
    lora_rank: Count = 4
    train_lora_a: bool = True
    learning_rate: Positive = 5e-4
    weight_decay: NotNegative = 0.01
    clipping: Literal["automatic", "flat"] = "automatic"
    clipping_norm: Positive = 1.0
    clipping_gamma: Positive = 1e-3
    draws_per_record: Count = 1
    timestep_start: ShareBelowOne = 0.0
    timestep_end: Share = 1.0
    ema_decay: ShareBelowOne = 0.0
    checkpoint_every: Count = 50
    max_failures: CountOrZero = 3
    num_workers: AutoCount = None
    cpus_per_worker: NotNegative = 0.0
    gpus_per_worker: AutoGpus = None

    @property
    def workers(self) -> int:
        """Number of workers; 1 while ``auto`` is not placed."""
        return self.num_workers or 1

    @property
    def gpus(self) -> float:
        """GPUs of a worker; 0 while ``auto`` is not placed (:mod:`sapf_ray.placement`)."""
        return self.gpus_per_worker or 0.0

    def __post_init__(self) -> None:
        require(
            self.adapter != "full" or self.randomize == "none",
            "finetune.randomize",
            self.randomize,
            "must be none where finetune.adapter is full: no matrix is left untrained",
        )
        require(
            self.timestep_start < self.timestep_end,
            "finetune.timestep_end",
            self.timestep_end,
            f"must lie in ({self.timestep_start:g}, 1], above timestep_start",
        )
