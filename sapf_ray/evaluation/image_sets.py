"""The synthetic images that are scored: a data set of ours, or any Parquet files of images.

Ours has a manifest; of others, what :mod:`sapf_ray.data.sources.parquet` says of columns and class
names holds, and all files count, those of a split ``train`` alone where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapf_ray.data.decoding import opened
from sapf_ray.data.files import check_labels, stamp
from sapf_ray.data.parquet import RowGroup, group_rows, read_columns, read_labels
from sapf_ray.data.record_source import Decoded
from sapf_ray.errors import DataError, reason
from sapf_ray.evaluation.pictures import Labelled, part_size
from sapf_ray.synthesis.writer import MANIFEST, read_manifest, synthetic_parts


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labelled images on disk; opening it decodes none.

    Attributes:
        path: Directory or file.
        files: The Parquet files, in order; none where there is a manifest.
        class_names: One per class; none where the files name no classes.
        n_images: Number of images.
    """

    path: Path
    files: tuple[Path, ...]
    class_names: tuple[str, ...]
    n_images: int

    @classmethod
    def open(cls, path: str | Path) -> ImageSet:
        """Reads a manifest, or footers.

        Raises:
            DataError: No images there, or a data set that is not finished.
        """
        path = Path(path).expanduser()
        if (path / MANIFEST).is_file() or not parquet_files(path):
            manifest = read_manifest(path)
            return cls(
                path=path,
                files=(),
                class_names=tuple(manifest["class_names"]),
                n_images=int(manifest["n_images"]),
            )
        files = parquet_files(path)
        columns = read_columns(files[0])
        for file in files[1:]:
            if read_columns(file) != columns:
                raise DataError(f"{file}: other columns or class names than {files[0].name}")
        rows = [int(group_rows(file).sum()) for file in files]
        return cls(path=path, files=files, class_names=columns.class_names, n_images=sum(rows))

    def parts(self, *, n_classes: int) -> Iterator[Labelled]:
        """All images in order, a part at a time.

        Args:
            n_classes: Number of classes that labels may name.

        Yields:
            Images uint8 (k, R, R, 3) and labels int64 (k,); R is the side of those with a manifest,
            else that of the first image.

        Raises:
            DataError: An image cannot be read, or a label is none of the classes.
        """
        if not self.files:
            yield from synthetic_parts(self.path)
            return
        side = self.side
        for file in self.files:
            columns = read_columns(file)
            labels = read_labels(file, columns.label, _stamp=stamp(file))
            labels = check_labels(labels, n_classes, where=f"{self.path}: labels")
            start = 0
            for number, rows in enumerate(group_rows(file).tolist()):
                group = RowGroup(path=file, number=number, start=start, column=columns.image)
                decoded = group.decode(np.arange(rows), side)
                while images := [_whole(image) for image in islice(decoded, part_size(side))]:
                    yield np.stack(images), labels[start : start + len(images)]
                    start += len(images)

    @property
    def side(self) -> int:
        """Shorter side of the first image in pixels.

        Raises:
            DataError: It cannot be read.
        """
        file = (self.files or parquet_files(self.path))[0]
        column = read_columns(file).image
        try:
            batch = next(pq.ParquetFile(file).iter_batches(1, columns=[column])).column(0)
        except (StopIteration, pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: no image can be read ({reason(error)})") from error
        content = batch.field("bytes") if column.endswith(".bytes") else batch
        with opened(content[0].as_py() or b"", name=f"{file}, row 0") as image:
            return min(image.size)


def _whole(image: Decoded) -> np.ndarray:
    if isinstance(image, DataError):
        raise image
    return image


def parquet_files(path: Path) -> tuple[Path, ...]:
    """The Parquet files of one data set, sorted; none where there are none."""
    if path.is_file():
        return (path,)
    files = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))
    train = [p for p in files if p.name.startswith("train-") or "train" in p.parent.parts[-1:]]
    return tuple(train or files)
