"""Private Evolution: the stage that takes the place of selection, fine-tuning and sampling.

References:
    1. Lin, Gopi, Kulkarni, Nori, Yekhanin. Differentially private synthetic data via foundation
       model APIs 1: Images. ICLR 2024. (PE)
    2. Xie et al. Differentially private synthetic data via foundation model APIs 2: Text. ICML
       2024. (Aug-PE)
"""

from __future__ import annotations

from typing import Annotated, Literal

from sapf_ray.config.kinds import AutoGpus, Count, CountOrZero, NameIn, NotNegative, Positive, Share
from sapf_ray.config.section import require, section


@section("evolution")
class EvolutionConfig:
    """Private Evolution: the public model's images, steered by the private records' noisy votes.

    Number and sampling of images are those of ``synthesis``: ``n_images`` of the final data set
    (any number: more images are more variations of the same winners, which costs no privacy),
    ``steps`` of a fresh image (a variation takes ``strength`` times as many), ``guidance_scale``,
    ``batch_size``, and ``shard_size``, which is also the number of images or records of one Ray
    task.

    Args:
        enabled: Evolve instead of fine-tuning; wants finetune.steps 0, and leaves ``saliency``
            unused.
        iterations: T, number of noisy histograms released, each over all records.
        population: Parents selected per class and iteration. Each candidate's noise competes with
            about N / (classes * candidates per class) votes, so small data sets need small
            populations.
        variations: Variations made of each parent.
        keep_selected: Parents stay candidates beside their variations (Aug-PE), and the best of
            them are released as they are; False replaces parents by their variations (PE).
        selection: sample (parents drawn in proportion to thresholded votes, PE) or rank (the
            best-voted, Aug-PE).
        lookahead: k: a candidate is judged by the mean embedding of k variations of it; 0 by its
            own embedding.
        threshold: H in units of the noise's standard deviation: taken off every noisy count, and
            what is below 0 becomes 0. About 2 to 3 in DPImageBench's settings, at every epsilon,
            when put in this unit.
        strength_start: Variation strength of the first iteration: the share of the
            diffusion time that is undone. At 1 nothing is left of a parent: an iteration at 1
            learns nothing through lookahead.
        strength_end: Strength of the last iteration; at most ``strength_start``, falling linearly.
        embedding: Space of the nearest-neighbour votes: vae (latent mean of the public model),
            glyph (the shipped feature network) or inception (needs ``inception_weights``).
        inception_weights: Path of torch-fidelity's Inception weights.
        cpus_per_task: CPU cores one task takes.
        gpus_per_task: GPUs one image or embedding task takes, a fraction too; ``auto`` is 1 where
            there are any.
    """

    enabled: bool = False
    iterations: Count = 7
    population: Count = 200
    variations: Count = 1
    keep_selected: bool = False
    selection: Literal["sample", "rank"] = "sample"
    lookahead: CountOrZero = 8
    threshold: NotNegative = 2.0
    strength_start: Share = 0.9
    strength_end: Share = 0.4
    embedding: Annotated[str, NameIn("evolution.embedding")] = "vae"
    inception_weights: str | None = None
    cpus_per_task: Positive = 1.0
    gpus_per_task: AutoGpus = None

    @property
    def gpus(self) -> float:
        """GPUs of a task; 0 while ``auto`` is not placed (:mod:`sapf_ray.placement`)."""
        return self.gpus_per_task or 0.0

    def __post_init__(self) -> None:
        require(
            self.strength_end <= self.strength_start,
            "evolution.strength_end",
            self.strength_end,
            f"must lie in (0, {self.strength_start:g}], not above strength_start",
        )
        require(
            self.embedding != "inception" or self.inception_weights is not None,
            "evolution.inception_weights",
            self.inception_weights,
            "must be a path when embedding is inception",
        )

    @property
    def candidates(self) -> int:
        """Candidates per class of every generation but the last."""
        return self.population * (self.variations + self.keep_selected)

    def strength(self, iteration: int) -> float:
        """Variation strength of an iteration in [0, iterations)."""
        share = iteration / max(1, self.iterations - 1)
        return self.strength_start + (self.strength_end - self.strength_start) * share
