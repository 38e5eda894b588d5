"""How well a classifier recognises what was generated."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from sapf_ray.glyphs import prompt_for
from sapf_ray.models.conditioning import encode_conditions, null_condition
from sapf_ray.models.glyph_features import GlyphFeatures
from sapf_ray.synthesis.sampler import sample_images

log = logging.getLogger("pretrain_public")


def recognition(
    pipe: Any,
    net: GlyphFeatures,
    *,
    seed: int,
    per_digit: int = 20,
) -> dict[str, float]:
    """Share of generated digits that the classifier, choosing among digits, reads as requested."""
    labels = torch.arange(10).repeat_interleave(per_digit)
    prompts = [prompt_for(str(digit)) for digit in range(10)]
    conditions = encode_conditions(pipe, prompts)[labels]
    rates = {}
    for guidance in (1.0, 2.0):
        images = sample_images(
            pipe,
            conditions,
            null=null_condition(pipe),
            seeds=range(seed, seed + len(labels)),
            steps=20,
            guidance_scale=guidance,
        )
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            logits = net.eval()(pixels)
        rates[f"guidance {guidance:g}"] = accuracy_of(logits[:, :10], labels)
    log.info("recognised as the requested digit: %s", rates)
    return rates


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's, to three digits."""
    right = logits.argmax(1) == labels
    return round(float(right.float().mean()), 3)
