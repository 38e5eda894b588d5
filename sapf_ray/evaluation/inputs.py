"""What a metric may read, and nothing else.

Images are decoded when a metric first uses them, once for all that have the same folder, and are
read from there a part at a time (:mod:`sapf_ray.evaluation.pictures`). A metric's row declares what
it reads; :meth:`Inputs.restricted_to` hands it an object on which everything else is refused. So
the list of what was computed from real images, on the privacy card and in MLflow, is true.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import ImageSource, Split
from sapf_ray.errors import DataError
from sapf_ray.evaluation.image_sets import ImageSet
from sapf_ray.evaluation.pictures import Labelled, Pictures, source_parts, store
from sapf_ray.evaluation.protocols import Task, protocol_of

SYNTHETIC = "synthetic images"
TEST = "real test images"
TRAIN = "real training images"
REFERENCE = "real reference images"  # test or train, as evaluation.fid_reference says
READABLE = (SYNTHETIC, TEST, TRAIN, REFERENCE)

T = TypeVar("T")


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
        work: Folder of the decoded images, shared by tasks and removed by the caller; without, one
            of this object's own, gone with it.
    """

    synthetic_dir: str
    source: ImageSource
    resolution: int
    config: EvaluationConfig
    seed: int
    device: str = "cpu"
    reads: frozenset[str] = frozenset(READABLE)
    work: str | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        train = self.config.fid_reference == "train"
        n = self.source.n_train if train else self.source.n_test
        return min(n, self.n_synthetic) if protocol_of(self.config).equal_reference else n

    @property
    def task(self) -> Task:
        """What classifiers are to tell apart."""
        return Task(data=self.source.name, side=self.resolution)

    @property
    def synthetic(self) -> Pictures:
        """Synthetic images and the labels that they were made for."""
        self._check(SYNTHETIC)
        return self._stored("synthetic", self._synthetic_parts)

    @property
    def test(self) -> Pictures:
        """Real test images."""
        self._check(TEST)
        return self._real("test")

    @property
    def train(self) -> Pictures:
        """Real training images."""
        self._check(TRAIN)
        return self._real("train")

    def some_train(self, n: int) -> Pictures:
        """As :attr:`train`, but at most n of them, drawn at random; no other is decoded."""
        self._check(TRAIN)
        return self._some("train", n)

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What several metrics of one process need, made when the first asks for it.

        Args:
            name: What it is.
            make: Makes it, from what the caller may read.
        """
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def reference(self) -> Pictures:
        """The real images that ``evaluation.fid_reference`` names, or as many of them, drawn at
        random, as the protocol has.
        """
        self._check(REFERENCE)
        split: Split = "train" if self.config.fid_reference == "train" else "test"
        return self._some(split, self.n_reference)

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

    def _some(self, split: Split, n: int) -> Pictures:
        """At most n images of a split, drawn at random."""
        there = self.source.n_train if split == "train" else self.source.n_test
        if n >= there:
            return self._real(split)
        chosen = np.random.default_rng(self.seed).permutation(there)[:n]
        return self._real(split, np.sort(chosen))

    def _real(self, split: Split, rows: np.ndarray | None = None) -> Pictures:
        def parts() -> Iterator[Labelled]:
            return source_parts(self.source, split, side=self.resolution, rows=rows)

        return self._stored(split if rows is None else f"{split}-{len(rows)}", parts)

    def _synthetic_parts(self) -> Iterator[Labelled]:
        theirs = self._images.class_names or self.class_names
        ours = np.array([self.class_names.index(name) for name in theirs])
        for images, labels in self._images.parts(n_classes=len(theirs)):
            smoothing = protocol_of(self.config).smoothing
            yield resize(images, self.resolution, smoothing), ours[labels]

    def _stored(self, name: str, parts: Callable[[], Iterator[Labelled]]) -> Pictures:
        if name not in self._kept:
            stored = store(self._folder / name, parts, side=self.resolution)
            self._kept[name] = dataclasses.replace(stored, owner=self._kept.get("folder"))
        return self._kept[name]

    @property
    def _folder(self) -> Path:
        if self.work is not None:
            return Path(self.work)
        if "folder" not in self._kept:
            self._kept["folder"] = tempfile.TemporaryDirectory(prefix="sapf-evaluation-")
        return Path(self._kept["folder"].name)

    def __reduce__(self) -> tuple[object, ...]:
        """Without the images that were read."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _rebuild, ({**fields, "_kept": {}},)


def _rebuild(fields: dict[str, object]) -> Inputs:
    return Inputs(**fields)  # type: ignore[arg-type]


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
"""Name of a filter to Pillow's, which widens when it reduces: no aliases."""


def resize(images: np.ndarray, resolution: int, smoothing: str = "bilinear") -> np.ndarray:
    """uint8 (n, h, w, 3) → uint8 (n, R, R, 3); unchanged where the size fits already."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    size = (resolution, resolution)
    resized = [Image.fromarray(i).resize(size, FILTERS[smoothing]) for i in images]
    return np.stack([np.asarray(image) for image in resized])
