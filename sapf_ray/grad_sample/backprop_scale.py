"""A constant factor on losses, so that half precision does not lose their gradients.

>>> backprop_scale(torch.float16, (4, 64, 64)), backprop_scale(torch.bfloat16, (4, 64, 64))
(16384.0, 1.0)
"""

from __future__ import annotations

import math

import torch


def backprop_scale(dtype: torch.dtype, latent_shape: tuple[int, ...]) -> float:
    """What losses are multiplied by before the backward pass, and per-sample gradients divided by
    behind it, in float32.

    A record's loss is a mean over its latent, so its derivative by one element is about 2/(C·h·w):
    1e-4 at 512 pixels, and deeper in the network below float16's smallest number, 6e-8. Times C·h·w
    it is near 1. The factor is a power of two, which changes no bit of a float32, and public; norms
    and clipping see gradients without it. It is the same at every step: loss scaling that follows
    overflows (as automatic mixed precision has it) would tell of the records.

    A gradient that overflows all the same is not finite, and its record counts for nothing.

    Args:
        dtype: The denoiser's.
        latent_shape: (C, h, w).
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** round(math.log2(math.prod(latent_shape)))
