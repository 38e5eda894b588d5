"""What the tests of ghost clipping share: choices of parameters, and a clip that remembers."""

from __future__ import annotations

from torch import Tensor, nn

from sapf_ray.privacy.clipping import clip_factors
from tests.networks import Case

CHOICES = {
    "all": lambda name: True,
    "attention": lambda name: any(
        part in name for part in (".to_q.", ".to_k.", ".to_v.", ".to_out.")
    ),
    "cross-attention q": lambda name: ".attn2.to_q.weight" in name,
    "biases": lambda name: name.endswith("bias"),
    "convolution weights and norms": lambda name: (
        ("conv" in name and name.endswith("weight")) or "norm" in name
    ),
}


def chosen(case: Case, choice: str = "all", freeze: bool = True) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in case.model.named_parameters() if CHOICES[choice](name)}
    if freeze:
        case.model.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
    return parameters


class Clip:
    """``clip_factors`` that remembers the norms it saw."""

    def __init__(self, clipping_norm: float = 1.0, mode: str = "automatic") -> None:
        self.clipping_norm, self.mode = clipping_norm, mode

    def __call__(self, norms: Tensor) -> Tensor:
        self.norms = norms
        return clip_factors(norms, self.clipping_norm, mode=self.mode, gamma=1e-3)
