"""Base of sources whose records are decoded one by one, so that one can be damaged by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import SKIPPED, SPLITS, ImageSource, Split, check_indices
from sapf_ray.data.files import evenly_spread
from sapf_ray.data.findings import Findings
from sapf_ray.data.pixels import PixelRange
from sapf_ray.errors import DataError

_AT_A_TIME = 256  # records that a thread looks at

Decoded = np.ndarray | DataError
"""An image uint8 (R, R, 3), or why there is none."""


def attempt(decode: Callable[[], np.ndarray]) -> Decoded:
    """What ``decode`` returns, or the error that it raises."""
    try:
        return decode()
    except DataError as error:
        return error


class RecordSource(ImageSource):
    """A subclass gives :meth:`decoded` and :meth:`labels`.

    Attributes:
        skips: Whether records that cannot be read are left out.
    """

    can_skip = True
    skips = False
    _pixel_range: PixelRange | None = None
    _test_fraction: float | None = None

    def heed(self, config: DataConfig) -> None:
        """Takes over what the user chose for records: those that cannot be read, the values of
        black and white, the share of a hashed test split. Options that a source has no use for were
        refused by its row of the catalog.
        """
        self.skips = config.on_error == "skip"
        self._pixel_range = config.pixel_range
        self._test_fraction = config.test_fraction

    @abstractmethod
    def decoded(
        self,
        split: Split,
        rows: np.ndarray,
        *,
        resolution: int,
    ) -> Iterator[Decoded]:
        """The images of ascending, distinct positions within a split, or why there is none."""

    def sample(self, split: Split) -> np.ndarray:
        """Positions within a split that ``verify`` decodes where no record is skipped."""
        return evenly_spread(self._n(split))

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = check_indices(indices, self._n(split), split=split)
        labels = self.labels(split)[indices]
        wanted, places = np.unique(indices, return_inverse=True)
        images = np.zeros((len(wanted), resolution, resolution, 3), dtype=np.uint8)
        unreadable = np.zeros(len(wanted), dtype=bool)
        for i, image in enumerate(self.decoded(split, wanted, resolution=resolution)):
            if not isinstance(image, DataError):
                images[i] = image
            elif self.skips:
                unreadable[i] = True
            else:
                raise image
        labels[unreadable[places]] = SKIPPED
        in_order = np.array_equal(places, np.arange(len(wanted)))
        return (images if in_order else images[places]), labels

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Decodes an evenly spread sample of each split; all, where records are skipped.

        A damaged image outside the sample is found, and named, by ``read``.
        """
        found = self.inspect(splits)
        if not self.skips:
            found.stop()

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        """As :meth:`verify`; what is found is returned.

        Raises:
            DataError: No record of a split can be read.
        """
        faults: dict[Split, tuple[str, ...]] = {}
        for split in splits:
            rows = np.arange(self._n(split)) if self.skips else self.sample(split)
            faults[split] = self._faults(split, rows)
            if faults[split] and len(faults[split]) == self._n(split):
                raise DataError(f"{faults[split][0]}; and no other image of the {split} split can")
        return Findings(faults=faults)

    def _faults(self, split: Split, rows: np.ndarray) -> tuple[str, ...]:
        parts = [rows[start : start + _AT_A_TIME] for start in range(0, len(rows), _AT_A_TIME)]

        def check(part: np.ndarray) -> list[str]:
            images = self.decoded(split, part, resolution=8)
            return [str(image) for image in images if isinstance(image, DataError)]

        with ThreadPoolExecutor() as pool:
            return tuple(fault for faults in pool.map(check, parts) for fault in faults)

    def _n(self, split: Split) -> int:
        return self.n_train if split == "train" else self.n_test
