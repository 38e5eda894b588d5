"""Private Evolution: the family without fine-tuning.

Four replaceable parts, cut as in Microsoft's library: ``api`` makes images, ``embedding`` compares
them, ``histogram`` lets records vote under DP, ``population`` selects and breeds;
``sapf_ray.evolution.evolve.evolve`` puts them together. PE and Aug-PE are two rows of
``sapf_ray.methods``.
"""

from __future__ import annotations

from sapf_ray.evolution.dataset import is_written, write_data_set
from sapf_ray.evolution.evolve import Parts, check_evolution, make_parts

__all__ = ["Parts", "check_evolution", "is_written", "make_parts", "write_data_set"]
