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

from typing import TypeVar

import torch
from torch import Tensor

from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseStream
from sapf_ray.privacy.rounded_gaussian import rounded_gaussian

TensorOrList = TypeVar("TensorOrList", Tensor, list[Tensor])


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


# What follows goes with its last callers, the optimizer and the scores.


def clip_factors(norms: Tensor, clipping_norm: float, *, mode: str, gamma: float = 0.0) -> Tensor:
    """The factor of each record, so that ``factor * norm <= clipping_norm``.

    A record whose norm is infinite or not a number gets the factor 0. That alone does not keep it
    out of a sum, for ``0 * inf`` is not a number: use :func:`clipped_sum`, or zero its gradient
    where the factor is 0.

    Args:
        norms: (n,) norm of each record's whole contribution.
        clipping_norm: C, the sensitivity of the sum.
        mode: ``automatic``, C / (norm + gamma), or ``flat``, min(1, C / norm).
        gamma: Of automatic clipping; above 0.
    """
    if clipping_norm <= 0:
        raise ValueError(f"clipping_norm = {clipping_norm!r}: must be above 0")
    norms = norms.detach().to(torch.float32)
    if mode == "automatic":
        if gamma <= 0:
            raise ValueError(f"gamma = {gamma!r}: must be above 0")
        factors = clipping_norm / (norms + gamma)
    elif mode == "flat":
        factors = (clipping_norm / norms).clamp(max=1.0)
    else:
        raise ValueError(f"mode = {mode!r}: must be automatic or flat")
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clipped_sum(per_record: Tensor, factors: Tensor) -> Tensor:
    """Sum over the first axis, each record times its factor; records with factor 0 are left out.

    Args:
        per_record: (n, ...).
        factors: (n,), from :func:`clip_factors`.
    """
    rows = per_record.flatten(1).to(factors.dtype)
    rows = torch.where((factors > 0).unsqueeze(1), rows, torch.zeros_like(rows))
    return (factors @ rows).view(per_record.shape[1:])


def add_gaussian_noise(
    total: TensorOrList,
    noise_multiplier: float,
    sensitivity: float,
    generator: NoiseStream | torch.Generator,
    *,
    non_private: bool = False,
) -> TensorOrList:
    """``total`` plus Gaussian noise of std ``noise_multiplier * sensitivity``.

    To be called once per release, on the sum over all shards and ranks. Noise is drawn in float32,
    tensor after tensor in the order given, so that equal streams give equal noise.

    Args:
        total: The clipped sum; not changed in place.
        noise_multiplier: Above 0.
        sensitivity: The clipping norm C; above 0.
        generator: The stream of this very release (``NoiseKey.stream``).
        non_private: Allows the multiplier 0, which adds nothing.

    Raises:
        ValueError: A multiplier that gives no privacy without ``non_private``, or a sum that is not
            finite.
    """
    if not noise_multiplier > 0 and not (non_private and noise_multiplier == 0):
        raise ValueError(
            f"noise_multiplier = {noise_multiplier!r}: must be above 0 (non_private allows 0)"
        )
    if not sensitivity > 0:
        raise ValueError(f"sensitivity = {sensitivity!r}: must be above 0")
    if isinstance(total, Tensor):
        return _noisy(total, noise_multiplier * sensitivity, generator=generator)
    return [_noisy(part, noise_multiplier * sensitivity, generator=generator) for part in total]


def _check_finite(total: Tensor) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ValueError("the sum is not finite: noise would not hide that")


def _noisy(total: Tensor, std: float, *, generator: NoiseStream | torch.Generator) -> Tensor:
    _check_finite(total)
    if std == 0:
        return total.clone()
    if isinstance(generator, NoiseStream):
        noise = generator.normal(total.numel()).view(total.shape).to(total.device)
    else:
        noise = torch.randn(
            total.shape, generator=generator, dtype=torch.float32, device=generator.device
        )
        noise = noise.to(total.device)
    return (total.to(torch.float32) + std * noise).to(total.dtype)


def add_gumbel_noise(
    total: Tensor, noise_multiplier: float, sensitivity: float, stream: NoiseStream
) -> Tensor:
    """``total`` in float64 plus Gumbel noise of scale ``noise_multiplier * sensitivity``.

    The positions of its largest entries are draws of the exponential mechanism; the values are no
    release.

    Raises:
        ValueError: The sum is not finite, or a multiplier or sensitivity is not above 0.
    """
    return (
        _wide(total, noise_multiplier, sensitivity=sensitivity)
        - noise_multiplier
        * sensitivity
        * (-stream.uniform(total.numel()).view(total.shape).log()).log()
    )


def add_laplace_noise(
    total: Tensor, noise_multiplier: float, sensitivity: float, stream: NoiseStream
) -> Tensor:
    """``total`` in float64 plus Laplace noise of scale ``noise_multiplier * sensitivity``.

    Raises:
        ValueError: The sum is not finite, or a multiplier or sensitivity is not above 0.
    """
    centred = stream.uniform(total.numel()).view(total.shape) - 0.5
    noise = -centred.sign() * (1 - 2 * centred.abs()).log()
    return (
        _wide(total, noise_multiplier, sensitivity=sensitivity)
        + noise_multiplier * sensitivity * noise
    )


def _wide(total: Tensor, noise_multiplier: float, *, sensitivity: float) -> Tensor:
    if not (noise_multiplier > 0 and sensitivity > 0):
        raise ValueError(
            f"noise_multiplier = {noise_multiplier!r}, sensitivity = {sensitivity!r}: "
            "must be above 0"
        )
    _check_finite(total)
    return total.double()
