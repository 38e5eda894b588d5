"""What may be known of the data before any record is read: all that a plan may depend on.

>>> Facts(n_records=1297, n_classes=10, words_known=False).records_per_class
129.7
"""

from __future__ import annotations

import math
from dataclasses import dataclass

N_CLASSES = 10  # assumed where a plan is made without the data's classes


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Public facts, from which remedies of grounding and their noise are chosen.

    Attributes:
        n_records: N, number of training records.
        n_classes: Number of classes.
        words_known: Whether the public model knows the classes' words.
        feature_dimension: Length of a record's public features; 0 where there are none.
    """

    n_records: int
    n_classes: int = N_CLASSES
    words_known: bool = True
    feature_dimension: int = 0

    @property
    def records_per_class(self) -> float:
        """N / number of classes, public."""
        return self.n_records / self.n_classes


def default_delta(n_records: int) -> float:
    """1 / (N ln N), as the paper."""
    return 1 / (n_records * math.log(n_records))
