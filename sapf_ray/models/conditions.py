"""What tells a denoiser the class of each image: one small mapping for every family of models.

>>> one = Conditions(states=torch.zeros(1, 16, 64), pooled=torch.zeros(1, 8), kind="sdxl")
>>> both = Conditions.cat([one, one])
>>> len(both), tuple(both.repeat_interleave(3).states.shape), sorted(both.parts())
(2, (6, 16, 64), ['pooled', 'states'])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sapf_ray.files import write_atomic


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """The conditions of n images; the first axis of every part is the image.

    Attributes:
        kind: Row of :data:`sapf_ray.models.conditioning.CONDITIONINGS`: how a denoiser is given
            them.
        states: (n, L, d) text-encoder states, float.
        labels: (n,) int64 label ids, of a model that is conditioned on labels.
        pooled: (n, p) one vector a prompt, float.
        ids: (n, 6) float32 sizes in pixels: original height and width, top and left of the crop,
            target height and width.
        mask: (n, L) bool, which tokens count.
        guidance: (n,) float32 guidance scale that a guidance-distilled denoiser is told.
    """

    kind: str = "text"
    states: Tensor | None = None
    labels: Tensor | None = None
    pooled: Tensor | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {part: getattr(self, part) for part in PARTS}
        return {name: value for name, value in named.items() if value is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """The same conditions with every part changed."""
        return self.with_parts(**{name: change(value) for name, value in self.parts().items()})

    def with_parts(self, **parts: Tensor) -> Conditions:
        """The same conditions with some parts replaced."""
        return replace(self, **parts)  # type: ignore[arg-type]  # kind is no part

    def __len__(self) -> int:
        return len(next(iter(self.parts().values())))

    def __getitem__(self, rows: Tensor | np.ndarray | slice | Sequence[int]) -> Conditions:
        """The conditions of some of the images."""
        return self.each(lambda part: part[rows])

    def repeat_interleave(self, k: int) -> Conditions:
        """Each condition k times, side by side."""
        return self.each(lambda part: part.repeat_interleave(k, dim=0))

    def expand(self, n: int) -> Conditions:
        """(1, ...) to (n, ...); no memory."""
        return self.each(lambda part: part.expand(n, *part.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditions:
        """On another device; states and pooled vectors in the denoiser's precision, if given."""
        moved = self.each(lambda part: part.to(device, non_blocking=True))
        if dtype is None:
            return moved
        cast = {name: part.to(dtype) for name, part in moved.parts().items() if name in STATES}
        return moved.with_parts(**cast)

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        return next(iter(self.parts().values())).device

    @staticmethod
    def cat(several: Sequence[Conditions]) -> Conditions:
        """One after the other; all of one kind, with the same parts."""
        first = several[0]
        joined = {name: torch.cat([getattr(c, name) for c in several]) for name in first.parts()}
        return first.with_parts(**joined)

    def save(self, path: Path, *, mode: int = 0o666) -> None:
        """Writes a safetensors file that :meth:`load` reads; ``mode`` are its permissions."""
        parts = {name: part.contiguous().cpu() for name, part in self.parts().items()}
        write_atomic(path, save(parts, metadata={"kind": self.kind}), mode=mode)

    @classmethod
    def load(cls, path: Path) -> Conditions:
        """Reads what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(kind=file.metadata()["kind"], **parts)


PARTS = tuple(field.name for field in fields(Conditions) if field.name != "kind")
STATES = ("states", "pooled")
