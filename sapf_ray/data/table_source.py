"""What sources share whose files hold records in rows, each with a label of the files' own.

Which rows are the records of a split follows from the files, from a hash where they do not say,
and from ``data.class_names``, which leaves out rows of other classes.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SPLITS, ImageSource, Split
from sapf_ray.data.classes import LEFT_OUT, MOST_CLASSES, Classes, choose_classes, left_out_note
from sapf_ray.data.files import check_labels, prompts_of
from sapf_ray.errors import DataError


class TableLabels(ImageSource):
    """A subclass gives the abstract methods, and calls :meth:`open_classes` at its opening.

    Files are those of ``train`` or of ``test``: their home. Where no split is given, all are at
    home in ``train``, and both splits have rows there.
    """

    _classes: Classes

    @abstractmethod
    def own_labels(self, home: Split) -> np.ndarray:
        """The files' own labels int64 of all rows, cached per process."""

    @abstractmethod
    def split_rows(self, split: Split) -> tuple[Split, np.ndarray]:
        """Where a split is at home, and its rows there, ascending int64, whatever their class."""

    def open_classes(
        self,
        config: DataConfig,
        own: tuple[str, ...],
        *,
        where: object,
    ) -> None:
        """Sets classes, prompts and sizes.

        Args:
            config: The requested classes and the template of the prompts.
            own: The files' names of their labels; empty where they only number them.
            where: What errors name.

        Raises:
            DataError: A label without a name, a single class, a split without records.
        """
        all_labels = [self.own_labels(home) for home in SPLITS]
        highest = max(int(labels.max(initial=-1)) for labels in all_labels)
        n_records = sum(map(len, all_labels))
        if not own and highest >= max(MOST_CLASSES, n_records):
            raise DataError(
                f"{where}: labels up to {highest:,} in {n_records:,} records; "
                "number the classes from 0"
            )
        for labels in all_labels:
            check_labels(labels, len(own) or highest + 1, where=where)
        self._classes = choose_classes(config.class_names, own, highest=highest, where=where)
        self.class_names = self._classes.names
        self.prompts = prompts_of(self.class_names, config.prompt_template)
        sizes = {split: len(self.records(split)[1]) for split in SPLITS}
        for split, n in sizes.items():
            if n == 0:
                raise DataError(f"{where}: no records in the {split} split")
        self.n_train = sizes["train"]
        self.n_test = sizes["test"]

    def records(self, split: Split) -> tuple[Split, np.ndarray]:
        """Where a split is at home, and the rows of its records there, ascending int64."""
        home, rows = self.split_rows(split)
        labels = self._classes.labels(self.own_labels(home)[rows])
        return home, rows[labels != LEFT_OUT]

    def labels(self, split: Split) -> np.ndarray:
        home, rows = self.split_rows(split)
        labels = self._classes.labels(self.own_labels(home)[rows])
        return labels[labels != LEFT_OUT]

    def notes(self) -> tuple[str, ...]:
        n_rows = sum(len(self.split_rows(split)[1]) for split in SPLITS)
        return left_out_note(n_rows - self.n_train - self.n_test)
