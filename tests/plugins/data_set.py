"""A data set: stripes, upright or lying, drawn when they are read."""

import numpy as np

from sapf_ray.config import DataConfig
from sapf_ray.data.base import ImageSource, Split, register


@register("stripes")
class Stripes(ImageSource):
    class_names = prompts = ("upright stripes", "lying stripes")
    n_train, n_test = 40, 20

    def __init__(self, config: DataConfig) -> None:
        self.path = config.path  # where the files would be

    def read(self, split: Split, indices: np.ndarray, *, resolution: int):
        labels = self.labels(split)[indices]
        bright = np.arange(resolution) % 2 * np.ones((resolution, 1)) * 255
        upright = np.repeat(bright[..., None], 3, axis=2).astype(np.uint8)
        return np.stack([upright, upright.swapaxes(0, 1)])[labels], labels

    def labels(self, split: Split) -> np.ndarray:
        return np.arange({"train": self.n_train, "test": self.n_test}[split]) % 2

    def fingerprint(self) -> str:
        return "stripes-1"

    def verify(self, splits=()) -> None:
        """Nothing here can be damaged."""
