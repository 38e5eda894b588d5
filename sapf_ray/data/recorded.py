"""The classes of a finished run, in place of its images.

What is made from a run later (:mod:`sapf_ray.reuse`) needs class names and prompts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from sapf_ray.data.base import SPLITS, ImageSource
from sapf_ray.data.findings import Split

if TYPE_CHECKING:
    import numpy as np


class RecordedClasses(ImageSource):
    """Class names and prompts without images: whoever asks for one is refused.

    Args:
        name: Name of the data set.
        class_names: One per class.
        prompts: One per class.
        n_train: Number of training images that there were.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], *, prompts: Sequence[str], n_train: int
    ) -> None:
        self.name = name
        self.class_names = tuple(class_names)
        self.prompts = tuple(prompts)
        self.n_train = n_train
        self.n_test = 0

    def read(
        self, split: Split, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self._refuse()

    def labels(self, split: Split) -> np.ndarray:
        self._refuse()

    def fingerprint(self) -> str:
        self._refuse()

    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"the images of {self.name} are not opened here, only its classes")
