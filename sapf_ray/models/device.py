"""Which torch device a task works on; apart from loading, so that what needs no diffusers does not
import it.
"""

from __future__ import annotations

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


def fix_rounding() -> None:
    """Kernels that round alike each time, in full float32, for passes that gradients come from.

    cuDNN would by default compute convolutions in TF32, whose products a norm taken elsewhere does
    not bound, and may choose another algorithm at each call.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
