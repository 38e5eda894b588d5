"""Table of embeddings: the spaces in which votes for candidates may be cast.

Importing this module loads no network; looking up a row does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from sapf_ray.config import EvolutionConfig, ModelConfig
from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from sapf_ray.evolution.embedding import Embedding

# (config, public model, images per forward pass) to the embedding; may raise DataError where what
# it needs is missing, before a run spends anything.
MakeEmbedding: TypeAlias = "Callable[[EvolutionConfig, ModelConfig, int], Embedding]"

EMBEDDINGS: Registry[MakeEmbedding] = Registry(
    "evolution.embedding",
    {
        "vae": "sapf_ray.evolution.embedding:make_vae",
        "glyph": "sapf_ray.evolution.embedding:make_glyph",
        "inception": "sapf_ray.evolution.embedding:make_inception",
    },
)
"""Value of ``evolution.embedding`` to constructor."""
