"""Private Evolution: the family without fine-tuning.

Four replaceable parts, cut as in Microsoft's library: ``api`` makes images, ``embedding`` compares them,
``histogram`` lets records vote under DP, ``population`` selects and breeds;
``sapf_ray.evolution.evolve.evolve`` puts them together.
"""

from __future__ import annotations

from sapf_ray.evolution.accounting import evolution_stage, noise_multiplier_for
from sapf_ray.evolution.dataset import write_data_set
from sapf_ray.evolution.evolve import Parts, make_parts
from sapf_ray.evolution.settings import AUG_PE, PE, EvolutionConfig

__all__ = [
    "AUG_PE", "PE", "EvolutionConfig", "Parts", "evolution_stage", "make_parts", "noise_multiplier_for",
    "write_data_set",
]
