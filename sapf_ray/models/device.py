"""Which torch device a task works on; apart from loading, so that what needs no diffusers does not
import it.
"""

from __future__ import annotations

from typing import Any

import torch

from sapf_ray.errors import ClusterError


def pick_device(gpus: float) -> str:
    """``cuda`` where a worker was given a GPU, else ``cpu``.

    Raises:
        ClusterError: A GPU was requested and this machine shows none.
    """
    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ClusterError(
            f"{gpus} GPUs were requested, but torch sees no CUDA device on this node"
        )
    return "cuda"


WIDE = 640  # channels
SMALL = 2  # side of a feature map


def conv_format(denoiser: Any, device: str) -> torch.memory_format:
    """How weights of a denoiser's convolutions lie in memory.

    Channels last is what convolutions want, on tensor cores and mostly on CPUs. But where a wide
    network works on few pixels, a CPU packs its weights anew at each call, and takes longer from
    channels last: of 1280 channels at 2 x 2 pixels, 8 images, forward and backward, 0.21 s rather
    than 0.13 in bfloat16, 0.52 rather than 0.13 in float32 (one core of a Xeon, oneDNN).

    Args:
        denoiser: At the run's resolution.
        device: Torch device string.
    """
    widths = denoiser.config.get("block_out_channels") or (0,)
    side = int(denoiser.config.get("sample_size") or 0) // 2 ** (len(widths) - 1)
    if device == "cpu" and max(widths) >= WIDE and side <= SMALL:
        return torch.contiguous_format
    return torch.channels_last


def fix_rounding() -> None:
    """Kernels that round alike each time, in full float32, for passes that gradients come from.

    cuDNN would by default compute convolutions in TF32, whose products a norm taken elsewhere does
    not bound, and may choose another algorithm at each call.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
