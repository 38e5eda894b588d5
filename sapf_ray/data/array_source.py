"""Base of sources whose images of a split are the rows of one array."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from sapf_ray.data.base import ImageSource, Split, check_indices
from sapf_ray.data.by_position import ArrayRows
from sapf_ray.data.decoding import decode_pixels
from sapf_ray.data.known_set import KnownSet
from sapf_ray.data.pixels import PixelRange, grey_levels
from sapf_ray.errors import DataError


class ArraySource(ImageSource):
    """Images uint8, or of any number type where the values of black and white are known.

    Shapes are (N, H, W), (N, H, W, C) or (N, C, H, W), with one or three channels. A subclass gives
    :meth:`pixel_rows`, :meth:`labels` and what else a source has.

    Attributes:
        takes_range: Whether other types than uint8 are read.
        pixel_range: Values shown black and white, for these.
    """

    takes_range = False
    pixel_range: PixelRange | None = None

    @abstractmethod
    def pixel_rows(self, split: Split) -> ArrayRows:
        """The array, one object per process."""

    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labels(split)
        indices = check_indices(indices, len(labels), split=split)
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        array = self.pixel_rows(split)
        for i, values in enumerate(array.rows(self.rows_of(split)[indices])):
            images[i] = decode_pixels(self._levels(values, array), resolution)
        return images, labels[indices]

    def rows_of(self, split: Split) -> np.ndarray:
        """Row of the array for each record of the split, int64; all in order unless overridden."""
        return np.arange(len(self.pixel_rows(split)))

    def check_pixels(self, array: ArrayRows) -> None:
        """Refuses arrays that are no images; reads none.

        Raises:
            DataError: Other shape or type.
        """
        shape = array.shape
        where = f"{array.path}: {array.name}"
        if channel_axis(shape) is None:
            raise DataError(
                f"{where} must have the shape (N, H, W), (N, H, W, 3) or (N, 3, H, W), is "
                f"{array.dtype} {shape}"
            )
        if array.dtype.kind not in "iuf":
            raise DataError(f"{where} must be numbers, is {array.dtype} {shape}")
        if array.dtype != np.uint8 and not self.takes_range:
            raise DataError(f"{where} must be uint8, is {array.dtype} {shape}")
        if array.dtype != np.uint8 and self.pixel_range is None:
            raise DataError(
                f"{where} is {array.dtype}; set data.pixel_range to the values that are black and "
                "white, e.g. 0,1"
            )

    def open_published(self, row: KnownSet) -> None:
        """Names and prompts of a published set, and the numbers of its records.

        Raises:
            DataError: See :meth:`check_sizes`.
        """
        self.class_names = row.class_names
        self.prompts = row.prompts
        self.n_train = self.check_sizes("train", row)
        self.n_test = self.check_sizes("test", row)

    def check_sizes(
        self,
        split: Split,
        row: KnownSet,
    ) -> int:
        """Number of records of a published set, which images and labels must agree on.

        Raises:
            DataError: They do not, or there is none.
        """
        array = self.pixel_rows(split)
        self.check_pixels(array)
        n_labels = len(self.labels(split))
        if n_labels != len(array) or n_labels == 0:
            raise DataError(
                f"{array.path}: {len(array)} {array.name} and {n_labels} labels; {row.obtain}"
            )
        return n_labels

    def check_published_test(self, row: KnownSet) -> None:
        """A file with the published number of training images must have that of test images, too.

        Raises:
            DataError: It has another.
        """
        if self.n_train == row.n_train and self.n_test != row.n_test:
            path = self.pixel_rows("test").path
            raise DataError(
                f"{path}: {self.n_test} test images, published are {row.n_test}; {row.obtain}"
            )

    def _levels(self, values: np.ndarray, array: ArrayRows) -> np.ndarray:
        """One image as uint8 (H, W) or (H, W, 3)."""
        axis = channel_axis(array.shape)
        if axis == 1:
            values = np.moveaxis(values, 0, -1)
        if values.ndim == 3 and values.shape[-1] == 1:
            values = values[..., 0]
        if values.dtype == np.uint8:
            return values
        assert self.pixel_range is not None, "check_pixels comes first"
        try:
            return grey_levels(values, self.pixel_range)
        except ValueError as error:
            raise DataError(f"{array.path}: an image of {array.name} {error}") from error


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """Where the channels of (N, …) are: 0 where there are none, 1, or 3; None for no images."""
    if len(shape) == 3 and all(shape[1:]):
        return 0
    if len(shape) == 4 and all(shape[1:]):
        for axis in (3, 1):
            if shape[axis] in (1, 3):
                return axis
    return None
