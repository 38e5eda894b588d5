"""Neighbouring data sets: what a run's guarantee compares, in words.

``plan.adjacency`` names a row of :data:`ADJACENCIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADD_OR_REMOVE_ONE = "add_or_remove_one"
ADD_OR_REMOVE_GROUP = "add_or_remove_one_group"


@dataclass(frozen=True, kw_only=True)
class Adjacency:
    """One relation between data sets.

    Attributes:
        unit: Whom the guarantee is for: ``image``, or ``group`` of images.
        short: For tables: what happens to one unit.
        sentence: Which two data sets are neighbours.
    """

    unit: str
    short: str
    sentence: str


ADJACENCIES: Mapping[str, Adjacency] = {
    ADD_OR_REMOVE_ONE: Adjacency(
        unit="image",
        short="one image added or removed",
        sentence="Two data sets are neighbours if one is the other with one image, and its label, "
        "added or removed.",
    ),
    ADD_OR_REMOVE_GROUP: Adjacency(
        unit="group",
        short="one group added or removed",
        sentence="Two data sets are neighbours if one is the other with one group, all its images "
        "and their labels, added or removed.",
    ),
}
"""Value of ``plan.adjacency`` to relation."""
