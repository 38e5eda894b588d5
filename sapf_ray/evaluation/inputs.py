"""What a metric may read, and nothing else.

Images are decoded when a metric first uses them, and once a process. A metric's row declares what
it reads; :meth:`Inputs.restricted_to` hands it an object on which everything else is refused. So
the list of what was computed from real images, on the privacy card and in MLflow, is true.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import SKIPPED, ImageSource, Split
from sapf_ray.errors import DataError
from sapf_ray.evaluation.image_sets import ImageSet, Labelled

SYNTHETIC = "synthetic images"
TEST = "real test images"
TRAIN = "real training images"
REFERENCE = "real reference images"  # test or train, as evaluation.fid_reference says
READABLE = (SYNTHETIC, TEST, TRAIN, REFERENCE)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where the images are that metrics compare. Pickles to the little that a Ray task needs.

    Args:
        synthetic_dir: Directory of a finished synthetic data set
            (:func:`sapf_ray.synthesis.launcher.synthesize`), or Parquet files of other images.
        source: The real images.
        resolution: Side R in pixels at which all images are compared; synthetic images of another
            size are resized.
        config: Settings of the evaluation.
        seed: Seeds whatever a metric draws at random.
        device: Torch device string.
        reads: What may be read, a subset of :data:`READABLE`.
    """

    synthetic_dir: str
    source: ImageSource
    resolution: int
    config: EvaluationConfig
    seed: int
    device: str = "cpu"
    reads: frozenset[str] = frozenset(READABLE)
    _kept: dict[str, Labelled] = field(default_factory=dict, repr=False, compare=False)

    def restricted_to(self, reads: Iterable[str]) -> Inputs:
        """The same inputs, on which anything but ``reads`` is refused; images read so far are
        shared.
        """
        return dataclasses.replace(self, reads=frozenset(reads))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def n_synthetic(self) -> int:
        """Number of synthetic images; none is decoded for it."""
        return self._images.n_images

    @functools.cached_property
    def _images(self) -> ImageSet:
        return ImageSet.open(self.synthetic_dir)

    @property
    def n_reference(self) -> int:
        """Number of real images that :attr:`reference` has; none is decoded for it."""
        if self.config.fid_reference == "train":
            return self.source.n_train
        return self.source.n_test

    @property
    def synthetic(self) -> Labelled:
        """Synthetic images uint8 (n, R, R, 3) and labels int64 (n,)."""
        self._check(SYNTHETIC)
        if SYNTHETIC not in self._kept:
            theirs = self._images.class_names or self.class_names
            images, labels = self._images.read(self.resolution, n_classes=len(theirs))
            ours = np.array([self.class_names.index(name) for name in theirs])
            self._kept[SYNTHETIC] = resize(images, self.resolution), ours[labels]
        return self._kept[SYNTHETIC]

    @property
    def test(self) -> Labelled:
        """Real test images uint8 (n, R, R, 3) and labels int64 (n,)."""
        self._check(TEST)
        return self._real("test", self.source.n_test)

    @property
    def train(self) -> Labelled:
        """Real training images uint8 (n, R, R, 3) and labels int64 (n,)."""
        self._check(TRAIN)
        return self._real("train", self.source.n_train)

    def some_train(self, n: int) -> Labelled:
        """As :attr:`train`, but at most n of them, drawn at random; no other is decoded."""
        self._check(TRAIN)
        if n >= self.source.n_train:
            return self.train
        chosen = np.random.default_rng(self.seed).permutation(self.source.n_train)[:n]
        images, labels = self.source.read("train", np.sort(chosen), resolution=self.resolution)
        readable = labels != SKIPPED
        return images[readable], labels[readable]

    @property
    def reference(self) -> Labelled:
        """The real images that ``evaluation.fid_reference`` names."""
        self._check(REFERENCE)
        split: Split = "train" if self.config.fid_reference == "train" else "test"
        return self._real(split, self.n_reference)

    def check_classes(self) -> None:
        """Refuses a synthetic data set of other classes; their order is free, and where its files
        name no classes they are taken for the source's.

        Raises:
            DataError: It has other classes than the source, or is unfinished.
        """
        names = self._images.class_names
        if names and sorted(names) != sorted(self.class_names):
            ours, theirs = ", ".join(names), ", ".join(self.class_names)
            raise DataError(
                f"{self.synthetic_dir}: its classes are {ours}, those of the real data {theirs}"
            )

    def _check(self, what: str) -> None:
        if what not in self.reads:
            raise ValueError(f"the metric's row does not declare that it reads {what}")

    def _real(self, split: Split, n: int) -> Labelled:
        if split not in self._kept:
            self._kept[split] = self.source.read_whole(split, resolution=self.resolution)
        return self._kept[split]

    def __reduce__(self) -> tuple[object, ...]:
        """Without the images that were read."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _rebuild, ({**fields, "_kept": {}},)


def _rebuild(fields: dict[str, object]) -> Inputs:
    return Inputs(**fields)  # type: ignore[arg-type]


def resize(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (n, h, w, 3) → uint8 (n, R, R, 3), bilinear; unchanged where the size fits already."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    size = (resolution, resolution)
    resized = [Image.fromarray(i).resize(size, Image.Resampling.BILINEAR) for i in images]
    return np.stack([np.asarray(image) for image in resized])
