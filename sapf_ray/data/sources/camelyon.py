"""Camelyon17-WILDS: 96x96 patches of lymph node slides from five hospitals.

``data.path`` holds ``metadata.csv`` and ``patches/``, or is the folder above ``camelyon17_v1.0``.
The split is the official one of WILDS (``wilds/datasets/camelyon17_dataset.py``): hospital
(``center``) 1 is its validation set and 2 its test set, whatever the column ``split`` says; of
hospitals 0, 3 and 4 the column says 0 for training and 1 for in-distribution validation. Training
here is WILDS ``train`` (302,436 images), test is WILDS ``test`` (85,054); the paper's 34,904
validation images are WILDS ``val``, hospital 1. Neither validation set is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import Grouping
from sapf_ray.data.base import SPLITS, Split, register
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.files import (
    Stamp,
    check_labels,
    first_existing,
    required_path,
    stamp,
)
from sapf_ray.data.findings import Findings
from sapf_ray.data.image_files import FileIndex, ImageFiles
from sapf_ray.data.path_groups import path_groups
from sapf_ray.errors import DataError, reason

VAL_CENTER = 1
TEST_CENTER = 2
TRAIN_SPLIT = 0
N_PUBLISHED = 455_954

_ROW = DATA_SETS["camelyon"]
_FOLDER = "camelyon17_v1.0"
_NUMBERS = ("node", "x_coord", "y_coord", "tumor", "center", "split")


@register("camelyon")
class Camelyon(ImageFiles):
    """Label 1 where the central 32x32 pixels hold tumor tissue.

    Opening reads ``metadata.csv``, no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: ``metadata.csv`` is missing or not in the published format; names it.
    """

    row = _ROW

    def __init__(self, config: DataConfig) -> None:
        self.root = required_path(config, self.row)
        self.heed(config)
        if (self.root / _FOLDER).is_dir():
            self.root = self.root / _FOLDER
        metadata = first_existing(self.root, ("metadata.csv",), row=self.row)
        first_existing(self.root, ("patches",), row=self.row)
        self.lists = (metadata,)
        self._read_names_and_sizes()

    def index(self) -> FileIndex:
        (metadata,) = self.lists
        return _index(metadata, stamp(metadata))

    def group_names(self, grouping: Grouping) -> Sequence[str]:
        """The published patients; ``folder:1`` has their slides."""
        paths = self._unchanged_index().paths["train"].to_pylist()
        if grouping.by == "published":
            patient = Grouping(by="pattern", value="^patch_patient_([^_]+)_")
            return path_groups(paths, patient, source=self.name, able="")
        able = "published, folder and pattern"
        return path_groups(paths, grouping, source=self.name, able=able)

    def inspect(self, splits: Sequence[Split] = SPLITS) -> Findings:
        (metadata,) = self.lists
        self.check_published_sizes(len(_metadata(metadata)), N_PUBLISHED)
        return super().inspect(splits)


@lru_cache(maxsize=2)
def _index(path: Path, _stamp: Stamp) -> FileIndex:
    table = _metadata(path)
    where = f"{path}: column tumor"
    labels = check_labels(table["tumor"].to_numpy(), 2, where=where, obtain=_ROW.obtain)
    paths = _patch_paths(table)
    center = table["center"].to_numpy()
    split = table["split"].to_numpy()
    of_training_hospital = (center != VAL_CENTER) & (center != TEST_CENTER)
    members: dict[Split, np.ndarray] = {
        "train": of_training_hospital & (split == TRAIN_SPLIT),
        "test": center == TEST_CENTER,
    }
    wanted = {
        "train": f"split {TRAIN_SPLIT} and a training hospital",
        "test": f"center {TEST_CENTER}",
    }
    index = FileIndex()
    for name, member in members.items():
        rows = np.flatnonzero(member)
        if not len(rows):
            raise DataError(f"{path}: no {name} image (rows of {wanted[name]}); {_ROW.obtain}")
        index.add(name, paths=paths.take(pa.array(rows)), labels=labels[rows])
    return index


def _patch_paths(table: pa.Table) -> pa.StringArray:
    """Path of each row's patch: ``patches/patient_P_node_N/patch_patient_P_node_N_x_X_y_Y.png``."""
    patient = table["patient"]
    node = pc.cast(table["node"], pa.string())
    x = pc.cast(table["x_coord"], pa.string())
    y = pc.cast(table["y_coord"], pa.string())

    def join(*parts: object) -> pa.ChunkedArray:
        return pc.binary_join_element_wise(*parts, "")

    slide = join("patient_", patient, "_node_", node)
    file = join("patch_", slide, "_x_", x, "_y_", y, ".png")
    return join("patches/", slide, "/", file).combine_chunks()


def _metadata(path: Path) -> pa.Table:
    """The columns of ``metadata.csv`` that are used.

    ``patient`` is a string, since its leading zeros are part of file names; the others are
    integers.
    """
    types = {"patient": pa.string(), **dict.fromkeys(_NUMBERS, pa.int64())}
    options = csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        table = csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, OSError, KeyError) as error:
        columns = ", ".join(types)
        raise DataError(
            f"{path}: not the published table with columns {columns} ({reason(error)}); "
            f"{_ROW.obtain}"
        ) from error
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path}: empty cells; the file is damaged, {_ROW.obtain}")
    return table
