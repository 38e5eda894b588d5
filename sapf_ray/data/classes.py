"""Which classes there are, and the labels of records that say their class in some way of their own.

The same for every source of one's own images: ``data.class_names`` names all classes in the order
of their labels; a class may be without images, and images of other classes are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sapf_ray.data.walking import as_text
from sapf_ray.errors import DataError

MOST_CLASSES = 1000  # numbers of classes that may exceed the number of records

LEFT_OUT = -1
"""Label of a record whose class is not among the named ones."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a source.

    Attributes:
        names: One per label.
        own: How the files call them, in the order of the files' own labels; empty where the files
            only number them.
    """

    names: tuple[str, ...]
    own: tuple[str, ...]

    def labels(self, own_labels: np.ndarray) -> np.ndarray:
        """Labels int64 (n,) of records, by the files' own labels; ``LEFT_OUT`` where none fits."""
        if not self.own:
            outside = own_labels >= len(self.names)
            return np.where(outside, LEFT_OUT, own_labels)
        numbers = {as_text(name): label for label, name in enumerate(self.names)}
        table = [numbers.get(as_text(name), LEFT_OUT) for name in self.own]
        return np.array(table, np.int64)[own_labels]


def choose_classes(
    requested: tuple[str, ...],
    own: tuple[str, ...],
    *,
    highest: int,
    where: object,
) -> Classes:
    """The classes, as ``data.class_names`` requests them or else as the files have them.

    Args:
        requested: ``data.class_names``; empty for those of the files.
        own: The files' names of their labels; empty where they only number them.
        highest: The highest of the files' own labels; -1 for none.
        where: What errors name.

    Raises:
        DataError: A single class, one that is named twice, or files whose classes are named
            otherwise.
    """
    if len(set(own)) != len(own):
        twice = next(name for name in own if own.count(name) > 1)
        raise DataError(f"{where}: two classes are called {twice}; labels need names of their own")
    numbered = tuple(str(label) for label in range(highest + 1))
    if requested and not own:
        by_number = all(name.isdecimal() for name in requested)
        return Classes(names=requested, own=numbered if by_number else ())
    names = requested or own or numbered
    if len(names) < 2:
        raise DataError(f"{where}: only one class; at least two are needed")
    if requested and not {as_text(name) for name in own} & {as_text(name) for name in requested}:
        raise DataError(
            f"{where}: none of data.class_names is among its classes, which are {_listed(own)}"
        )
    return Classes(names=names, own=own)


def labels_of_words(words: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes written in words, sorted (numbers by value), and int64 (n,) labels of the records."""
    texts = [as_text(word.strip()) for word in words]
    names = sorted_names(set(texts))
    numbers = {name: label for label, name in enumerate(names)}
    return names, np.array([numbers[text] for text in texts], np.int64)


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Numbers by value, words by alphabet."""
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def left_out_note(n: int) -> tuple[str, ...]:
    """The line for records that ``data.class_names`` leaves out, if there are any."""
    return (f"{n:,} images have labels that data.class_names lacks",) if n else ()


def _listed(names: Sequence[str]) -> str:
    more = ", …" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
