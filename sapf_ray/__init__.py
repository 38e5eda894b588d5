"""Differentially private image synthesis on Ray.

The names below are the library's public face; everything else may move between versions. A name is
imported when it is first used, so that ``import sapf_ray`` costs no torch.

>>> import sapf_ray
>>> config = sapf_ray.from_dict({"data": {"source": "digits"}, "privacy": {"epsilon": 3}})
>>> config.privacy.epsilon
3.0
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapf_ray.config import RunConfig, from_dict, to_dict
    from sapf_ray.data.base import open_source
    from sapf_ray.errors import SapfError
    from sapf_ray.methods import METHODS, find_method
    from sapf_ray.pipeline import run
    from sapf_ray.presets import load_preset
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.privacy.planner import make_plan
    from sapf_ray.reuse.commands import evaluate, synthesize
    from sapf_ray.reuse.images import evaluate_images
    from sapf_ray.synthesis.writer import read_synthetic

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "Ledger",
    "RunConfig",
    "SapfError",
    "__version__",
    "evaluate",
    "evaluate_images",
    "find_method",
    "from_dict",
    "load_preset",
    "make_plan",
    "open_source",
    "read_synthetic",
    "run",
    "synthesize",
    "to_dict",
]

_HOMES = {
    "METHODS": "sapf_ray.methods",
    "Ledger": "sapf_ray.privacy.ledger",
    "RunConfig": "sapf_ray.config",
    "SapfError": "sapf_ray.errors",
    "evaluate": "sapf_ray.reuse.commands",
    "evaluate_images": "sapf_ray.reuse.images",
    "find_method": "sapf_ray.methods",
    "from_dict": "sapf_ray.config",
    "load_preset": "sapf_ray.presets",
    "make_plan": "sapf_ray.privacy.planner",
    "open_source": "sapf_ray.data.base",
    "read_synthetic": "sapf_ray.synthesis.writer",
    "run": "sapf_ray.pipeline",
    "synthesize": "sapf_ray.reuse.commands",
    "to_dict": "sapf_ray.config",
}
"""Public name → the module that defines it."""


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
