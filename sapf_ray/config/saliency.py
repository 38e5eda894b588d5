"""Private selection of weight matrices."""

from __future__ import annotations

from typing import Annotated, Literal

from sapf_ray.config.kinds import AutoGpus, Count, NameIn, OpenShare, Positive, Share
from sapf_ray.config.section import require, section
from sapf_ray.registry import names, row


@section("saliency")
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
        ratio: Share of the pool kept: ceil(ratio * K) matrices, or whole layers that
            hold as many.
        noise_multiplier: Noise std over sensitivity of each release. 25 instead of the paper's 5:
            with the per-sample-norm score it costs next to nothing and still ranks well (design
            section 5). The exponential mechanism's draws together cost what a Gaussian release with
            this noise costs; of propose_test_release it is 1 / epsilon of the test.
        rounds: Steps of force (each a release) and of synflow; 5 as Table 15's hours
            say of force.
        delta_share: Share of the run's delta that propose_test_release spends.
        sample_rate: Poisson rate of the records that are scored; 1 is the full pass.
        draws_per_record: Noise/timestep draws averaged within a record before clipping, as in
            finetune; of a group, spread over its images.
        clipping: automatic (v / (|v| + gamma)) or flat (paper: clip at clipping_norm).
        clipping_norm: C_s, bound on one record's contribution.
        clipping_gamma: gamma of automatic clipping, in units of the per-record norm.
        shard_size: Records per Ray task.
        micro_batch_size: Records per forward/backward pass.
        cpus_per_task: CPU cores one scoring task takes.
        gpus_per_task: GPUs one scoring task takes, a fraction too; ``auto`` is 1 where there are
            any.
    """

    score: Annotated[str, NameIn("saliency.score")] = "per_sample_norm"
    pool: Literal["qkv", "qkvo", "qkv_no_middle", "cross_q", "all"] = "qkv"
    ratio: Share = 0.3
    mechanism: Annotated[str, NameIn("saliency.mechanism")] = "gaussian"
    granularity: Literal["matrix", "layer"] = "matrix"
    noise_multiplier: Positive = 25.0
    rounds: Count = 5
    delta_share: OpenShare = 0.1
    sample_rate: Share = 1.0
    draws_per_record: Count = 1
    clipping: Literal["automatic", "flat"] = "automatic"
    clipping_norm: Positive = 1.0
    clipping_gamma: Positive = 1e-4
    shard_size: Count = 512
    micro_batch_size: Count = 64
    cpus_per_task: Positive = 1.0
    gpus_per_task: AutoGpus = None

    @property
    def gpus(self) -> float:
        """GPUs of a task; 0 while ``auto`` is not placed (:mod:`sapf_ray.placement`)."""
        return self.gpus_per_task or 0.0

    def __post_init__(self) -> None:
        if self.mechanism == "gaussian":
            return
        why = f"where saliency.mechanism is {self.mechanism}"
        key = "saliency.score"
        require(
            row(key, self.score).per_matrix,
            key,
            self.score,
            f"must be {' or '.join(n for n in names(key) if row(key, n).per_matrix)} {why}: "
            "it draws from one number a matrix",
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
