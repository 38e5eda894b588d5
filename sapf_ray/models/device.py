"""Which torch device a task works on; apart from loading, so that what needs no diffusers does not
import it.
"""

from __future__ import annotations

import torch

from sapf_ray.errors import ClusterError


def pick_device(gpus: float) -> str:
    """``cuda`` where a worker was given a GPU, else ``cpu``.

    Raises:
        ClusterError: A GPU was asked for and this machine shows none.
    """
    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ClusterError(
            f"{gpus} GPUs were asked for, but torch sees no CUDA device on this node"
        )
    return "cuda"
