"""Neighbouring data sets: what a run's guarantee compares, in words.

``plan.adjacency`` names a row of :data:`ADJACENCIES`. Which one it is follows from where N comes
from, for N enters sample rates, delta and divisors, and stands in the plan that everyone may read:

- counted from the images, N has to be the same for both neighbours: one of them is *zeroed out*,
  becomes an empty record that adds nothing to any sum [1, 2];
- a nominal number (``data.n_records``) is the same for all data sets, so that one may be added or
  removed.

docs/privacy.md has the proof that every mechanism here costs the same under both, so accountants
price both as dp-accounting's add-or-remove-one.

References:
    1. Kairouz et al. Practical and private (deep) learning without sampling or shuffling. ICML
       2021. (zero-out)
    2. Ponomareva et al. How to DP-fy ML. JAIR 2023. (section 2.1.1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ZERO_OUT_ONE = "zero_out_one"
ADD_OR_REMOVE_ONE = "add_or_remove_one"


@dataclass(frozen=True, kw_only=True)
class Adjacency:
    """One relation between data sets.

    Attributes:
        unit: Whom the guarantee is for: ``image``, or ``group`` of images.
        verb: What happens to one unit, for tables.
        doing: The same in a sentence.
        sentence: Which two data sets are neighbours.
    """

    unit: str
    verb: str
    doing: str
    sentence: str

    @property
    def short(self) -> str:
        """For tables, e.g. ``zero out one image``."""
        return f"{self.verb} one {self.unit}"


def adjacency_name(*, nominal: bool, groups: bool) -> str:
    """The row for a run.

    Args:
        nominal: Whether N is given, not counted.
        groups: Whether the unit is a group of images.

    >>> adjacency_name(nominal=False, groups=True)
    'zero_out_one_group'
    """
    name = ADD_OR_REMOVE_ONE if nominal else ZERO_OUT_ONE
    return f"{name}_group" if groups else name


def _zero_out(unit: str, all_of_it: str) -> Adjacency:
    return Adjacency(
        unit=unit,
        verb="zero out",
        doing="zeroing out",
        sentence=f"Two data sets of N {unit}s are neighbours if one is the other with one {unit}, "
        f"{all_of_it}, zeroed out: replaced by an empty record, which adds nothing to any sum.",
    )


def _add_or_remove(unit: str, all_of_it: str) -> Adjacency:
    return Adjacency(
        unit=unit,
        verb="add/remove",
        doing="adding or removing",
        sentence=f"Two data sets are neighbours if one is the other with one {unit}, {all_of_it}, "
        "added or removed.",
    )


_ALL = {"image": "and its label", "group": "all its images and their labels"}
ADJACENCIES: Mapping[str, Adjacency] = {
    adjacency_name(nominal=nominal, groups=unit == "group"): relation(unit, _ALL[unit])
    for unit in ("image", "group")
    for nominal, relation in ((False, _zero_out), (True, _add_or_remove))
}
"""Value of ``plan.adjacency`` to relation."""
