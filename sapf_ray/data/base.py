"""What every source of sensitive images offers, and the table of sources.

Opening a source lists what is there and decodes no image, so a run can be planned from the number
of records before anything sensitive is read. A source pickles to the little a Ray task needs in
order to read its own shard; nothing is kept decoded.

>>> from sapf_ray.config import DataConfig
>>> from sapf_ray.data import open_source
>>> import numpy as np
>>> source = open_source(DataConfig(source="digits"))
>>> source.n_train, source.n_test, source.prompts[3]
(1297, 500, 'An image of the digit three')
>>> images, labels = source.read("train", np.arange(4), resolution=32)
>>> images.shape, images.dtype, labels.dtype
((4, 32, 32, 3), dtype('uint8'), dtype('int64'))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import KEY, Grouping, grouping_of
from sapf_ray.data.catalog import DATA_SETS, SHARED_READERS
from sapf_ray.data.findings import Findings, Split
from sapf_ray.data.known_set import OPTIONAL
from sapf_ray.data.medmnist_sets import NOT_OFFERED
from sapf_ray.errors import ConfigError
from sapf_ray.registry import Registry

if TYPE_CHECKING:
    import numpy as np  # the table of sources is listed without it

    from sapf_ray.data.units import Units

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")

SKIPPED = -1
"""Label of a record that cannot be read, where ``data.on_error`` is ``skip``."""


class ImageSource(ABC):
    """Labelled images with a fixed train/test split.

    Attributes:
        name: Name of the source in :data:`SOURCES`.
        class_names: One name per class; a label is an index into it.
        prompts: One prompt per class, in the same order.
        n_train: Training images.
        units: Which of them are one group's; None where each image is a unit of privacy.
        n_test: Test records.
        can_skip: Whether a record that cannot be read can be left out (``data.on_error``).
        resolution: Side in pixels at which scores compare the images, by public knowledge; None
            where it is not known.
    """

    can_skip = False
    resolution: int | None = None
    units: Units | None = None
    name: str
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    n_train: int
    n_test: int

    @property
    def n_units(self) -> int:
        """N of the privacy analysis: training images, or groups of them."""
        return self.n_train if self.units is None else len(self.units)

    @property
    def whole(self) -> ImageSource:
        """The source of all images, of which this one may leave some out."""
        return self

    def group_names(self, grouping: Grouping) -> Sequence[str]:
        """Name of each training image's group, in the images' order, by listing.

        Raises:
            ConfigError: The source has no such groups.
            DataError: An image is in none.
        """
        raise no_such_groups(grouping, self.name)

    @abstractmethod
    def read(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        resolution: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decodes the named records only.

        Args:
            split: ``train`` or ``test``.
            indices: (n,) integer positions within the split, in any order.
            resolution: Side R of the returned images in pixels.

        Returns:
            Images uint8 (n, R, R, 3) and labels int64 (n,), in the order of ``indices``; with
            ``data.on_error = skip`` a record that cannot be read has the label ``SKIPPED``.

        Raises:
            DataError: An image cannot be read; names its path.
            IndexError: An index outside the split.
        """

    @abstractmethod
    def labels(self, split: Split) -> np.ndarray:
        """Labels int64 (n_split,) of a whole split, without decoding an image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes when the records do: whether a run can be resumed."""

    @abstractmethod
    def verify(self, splits: Sequence[Split] = SPLITS) -> None:
        """Looks for damaged records before any budget is spent.

        Args:
            splits: The splits that the run will read; no other is touched.

        Raises:
            DataError: At least one record cannot be read; names the first.
        """

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        """As :meth:`verify`; a source that finds all faults at once returns them instead.

        Raises:
            DataError: A record cannot be read, and the source does not go on to the next.
        """
        self.verify(splits)
        return Findings(faults={})

    def notes(self) -> tuple[str, ...]:
        """What listing left out, one line each, with numbers; names no file."""
        return ()

    def file_bytes(self) -> int:
        """Size of all image files by listing, for estimates of time; 0 where it is not known."""
        return 0

    def read_whole(self, split: Split, *, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """All records of a split that can be read, as :meth:`read` returns them."""
        import numpy as np

        n = self.n_train if split == "train" else self.n_test
        images, labels = self.read(split, np.arange(n), resolution=resolution)
        kept = labels != SKIPPED
        return (images, labels) if kept.all() else (images[kept], labels[kept])


SOURCES: Registry[Callable[[DataConfig], ImageSource]] = Registry(
    "data.source", SHARED_READERS, folder="sapf_ray.data.sources", refused=NOT_OFFERED
)
"""Source name → constructor. A new source is one file that adds itself with :func:`register`."""


def register(name: str) -> Callable[[type[ImageSource]], type[ImageSource]]:
    """Class decorator that enters a source under ``name``.

    Its constructor takes a :class:`DataConfig`.
    """

    def enter(cls: type[ImageSource]) -> type[ImageSource]:
        cls.name = name
        SOURCES[name] = cls
        return cls

    return enter


def open_source(config: DataConfig) -> ImageSource:
    """The source that ``data.source`` names.

    Raises:
        ConfigError: Unknown source, or an option the source needs is missing.
        DataError: The source's files are missing or not laid out as expected.
    """
    constructor = SOURCES[config.source]
    _check_options(config)
    source = constructor(config)
    _rename_classes(source, config)
    if source.resolution is None:
        row = DATA_SETS.get(config.source)
        source.resolution = config.resolution or (row.resolution if row else None)
    if config.on_error == "skip" and not source.can_skip:
        raise ConfigError("data.on_error", "skip", f"must be stop for {config.source}")
    if config.groups is not None:
        from sapf_ray.data.units import checked_units

        source.units = checked_units(source.group_names(grouping_of(config.groups)), config.groups)
    return source


def no_such_groups(grouping: Grouping, source: str, *, able: str = "") -> ConfigError:
    """A source cannot find groups that way.

    Args:
        grouping: The way.
        source: Name of the source.
        able: Ways in which it can, if any.
    """
    allowed = f"{grouping.by} is not for data.source = {source}"
    return ConfigError(KEY, str(grouping), f"{allowed}, which takes {able}" if able else allowed)


def _check_options(config: DataConfig) -> None:
    """Refuses what a known source would not heed, before anything is read."""
    row = DATA_SETS.get(config.source)
    if row is None:
        return
    for key, nothing in OPTIONAL.items():
        value = getattr(config, key)
        if value == nothing or key in row.options:
            continue
        allowed = f"is not for data.source = {row.name}; {_WHY[key]}"
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"data.{key}", shown, allowed)


def _rename_classes(source: ImageSource, config: DataConfig) -> None:
    """Other words for the classes of a published set, in the order of its labels.

    Raises:
        ConfigError: Not one for each class.
    """
    row = DATA_SETS.get(config.source)
    if row is None or not row.class_names or not config.class_names:
        return
    published = len(row.class_names)
    if len(config.class_names) != published:
        raise ConfigError(
            "data.class_names",
            list(config.class_names),
            f"must be {published} names for {row.name}, one for each of its classes "
            f"({', '.join(row.class_names[:3])}, …)",
        )
    source.class_names = config.class_names
    source.prompts = tuple(
        config.prompt_template.replace("{name}", name) for name in config.class_names
    )


_WHY = {
    "groups": "its files do not say whose an image is: leave it out",
    "on_error": "its images lie in one array, which is whole or not: must be stop",
    "pixel_range": "its pixels have 8 bits, leave it out",
    "resolution": "its size is published; evaluation.resolution is the size of the comparison",
}


def check_indices(
    indices: np.ndarray,
    n: int,
    *,
    split: str,
) -> np.ndarray:
    """``indices`` as an int64 vector, every entry in [0, n).

    Raises:
        IndexError: Otherwise; negative positions are refused too, since they would hide an
            off-by-one.
    """
    import numpy as np

    indices = np.asarray(indices, dtype=np.int64)
    if not indices.size:
        return indices
    if indices.min() < 0 or indices.max() >= n:
        raise IndexError(f"record indices must lie in [0, {n}) of the {split} split")
    return indices
