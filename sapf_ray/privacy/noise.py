"""The noise of the mechanisms. :mod:`sapf_ray.privacy.release` alone may import this module.

Gaussian noise is added to an exact sum in integers, on the sum's own grid, so neither its values
nor their gaps tell anything about the sum (:mod:`sapf_ray.privacy.rounded_gaussian`).

Gumbel and Laplace noise is float64 from 53-bit uniforms. Its values never leave the releaser: only
the order of K noisy numbers does, or whether one passes a threshold. An order differs from that
under ideal noise only where two noisy values come closer than the noise's own rounding, with
probability about K**2 * 2**-50 (8e-12 at K = 96), once a selection.

References:
    1. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
    2. Durfee, Rogers. Practical differentially private top-k selection with pay-what-you-get
       composition. NeurIPS 2019. (Gumbel noise and the exponential mechanism)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseStream
from sapf_ray.privacy.rounded_gaussian import rounded_gaussian


def noisy_sum(total: ExactSum, noise_multiplier: float, stream: NoiseStream) -> list[Tensor]:
    """The sum plus rounded Gaussian noise of std ``noise_multiplier * total.sensitivity``.

    To be called once a release, on the sum over all shards and ranks. Noise is drawn tensor after
    tensor, so equal streams give equal noise.

    Args:
        total: The exact sum.
        noise_multiplier: Above 0.
        stream: The stream of this very release.

    Returns:
        float64 tensors on the sum's grid.
    """
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier = {noise_multiplier!r}: must be above 0")
    total.check_range()
    std = noise_multiplier * total.sensitivity / total.step
    noise = torch.from_numpy(rounded_gaussian(sum(p.numel() for p in total.units), std, stream))
    parts = noise.split([part.numel() for part in total.units])
    return [
        (part.cpu() + drawn.view(part.shape)).double() * total.step
        for part, drawn in zip(total.units, parts, strict=True)
    ]


def add_gumbel(values: Tensor, scale: float, stream: NoiseStream) -> Tensor:
    """Float64 values plus Gumbel noise; only their order may be released.

    The positions of the largest entries are draws of the exponential mechanism.
    """
    _check_scale(scale)
    uniform = stream.uniform(values.numel()).view(values.shape)
    return values.double() - scale * (-uniform.log()).log()


def add_laplace(values: Tensor, scale: float, stream: NoiseStream) -> Tensor:
    """Float64 values plus Laplace noise; only comparisons with a threshold may be released."""
    _check_scale(scale)
    centred = stream.uniform(values.numel()).view(values.shape) - 0.5
    return values.double() - scale * centred.sign() * (1 - 2 * centred.abs()).log()


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale = {scale!r}: must be above 0")
