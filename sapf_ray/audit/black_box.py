"""The black-box audit: crafted images among the training images, and what the run gave away.

An attacker who has the adapter scores a canary by how much better the adapter denoises it than the
public model does; one who has the synthetic images alone, by its distance to the nearest of them.
Such attacks are far weaker than those on the releases themselves, so what they show is a lower
bound and no measure of the claim.

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Carlini et al. Extracting training data from diffusion models. USENIX Security 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sapf_ray.audit.auditor import CanaryScoreAuditor
from sapf_ray.audit.bounds import Guesses, fdp_epsilon
from sapf_ray.audit.families import events_family
from sapf_ray.audit.findings import Finding
from sapf_ray.audit.white_box import Claim
from sapf_ray.config import FinetuneConfig, ModelConfig
from sapf_ray.data.canary_images import CanaryImages
from sapf_ray.finetune.adapter import load_adapter
from sapf_ray.models.conditioning import denoiser_of, encode_conditions
from sapf_ray.models.denoising import draw, per_record_loss
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.processes import forward_process
from sapf_ray.models.public_features import posterior_moments
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.synthesis.writer import synthetic_parts

SHARE = 0.5  # of the canaries that are guessed
DRAWS = 32  # of noise and time, the same for both models
_BATCH = 8  # canaries


def black_box_finding(
    audit: str, scores: np.ndarray, coins: np.ndarray, *, claim: Claim, confidence: float
) -> Finding:
    """The f-DP one-run bound of one attack.

    Args:
        audit: Name of the attack.
        scores: (n,) the higher, the likelier in.
        coins: (n,) bool.
        claim: What the run says.
        confidence: Of the bound.
    """
    family = events_family(claim.charges, claim.delta)
    auditor = CanaryScoreAuditor(scores[coins], scores[~coins])
    guesses = auditor.guesses(SHARE)
    all_right = Guesses(canaries=guesses.canaries, made=guesses.made, right=guesses.made)
    shown = fdp_epsilon(guesses, family, confidence=confidence)
    return Finding(
        audit=audit,
        quantity="ε",
        claim=claim.epsilon,
        shown=shown,
        falsified=shown > claim.epsilon,
        confidence=confidence,
        ceiling=fdp_epsilon(all_right, family, confidence=confidence),
        note=f"{guesses.right} of {guesses.made} guesses right, {guesses.canaries} images; area "
        f"under the curve {auditor.attack_auroc():.3f}",
    )


def loss_scores(
    images: CanaryImages, model: ModelConfig, config: FinetuneConfig, *, adapter: Path
) -> np.ndarray:
    """(n,) denoising loss of each canary under the public model, less that with the adapter.

    Args:
        images: The canaries.
        model: The public model.
        config: Times of the loss are drawn where training drew them.
        adapter: Folder of the released adapter.
    """
    before, after = (
        torch.cat(list(_losses(images, model, config, adapter=folder)))
        for folder in (None, adapter)
    )
    return (before - after).numpy()


@torch.no_grad()
def _losses(
    images: CanaryImages, model: ModelConfig, config: FinetuneConfig, *, adapter: Path | None
) -> Iterator[torch.Tensor]:
    pipe = load_pipeline(model, device="cuda" if torch.cuda.is_available() else "cpu")
    pictures, labels = images.crafted(np.arange(images.count), resolution=resolution_of(pipe))
    moments = torch.from_numpy(posterior_moments(pipe.vae, pictures))
    conditions = encode_conditions(pipe, images.prompts, class_labels=model.class_labels)
    if adapter is not None:
        load_adapter(pipe, adapter)
    denoiser, process = denoiser_of(pipe), forward_process(pipe)
    key = NoiseKey.create(reproducible_seed=0)  # the attacker's own randomness
    for start in range(0, images.count, _BATCH):
        rows = np.arange(start, min(start + _BATCH, images.count))
        yield per_record_loss(
            denoiser,
            process,
            moments=moments[rows],
            scale=LatentScale.of(pipe.vae),
            conditions=conditions[labels[rows]].to(denoiser.device, denoiser.dtype),
            draws=draw(
                key,
                "audit/loss",
                0,
                rows,
                k=DRAWS,
                latent_shape=(moments.shape[1] // 2, *moments.shape[2:]),
                process=process,
                part=(config.timestep_start, config.timestep_end),
            ),
        ).cpu()


def distance_scores(images: CanaryImages, synthetic: Path) -> np.ndarray:
    """(n,) minus the distance, in pixels' values, of each canary to the nearest synthetic image.

    Args:
        images: The canaries.
        synthetic: Folder of the data set.
    """
    nearest = np.full(images.count, np.inf)
    canaries = None
    for pictures, _ in synthetic_parts(synthetic):
        if canaries is None:
            crafted, _ = images.crafted(np.arange(images.count), resolution=pictures.shape[1])
            canaries = crafted.reshape(images.count, -1).astype(np.float64)
        made = pictures.reshape(len(pictures), -1).astype(np.float64)
        squares = (canaries**2).sum(1)[:, None] + (made**2).sum(1) - 2 * canaries @ made.T
        nearest = np.minimum(nearest, squares.min(1))
    return -np.sqrt(np.maximum(nearest, 0.0))
