"""Camelyon17-WILDS: 96x96 patches of lymph node slides from five hospitals.

``data.path`` holds ``metadata.csv`` and ``patches/``, or is the folder above ``camelyon17_v1.0``.
The split is the official one of WILDS (``wilds/datasets/camelyon17_dataset.py``): hospital
(``center``) 1 is its validation set and 2 its test set, whatever the column ``split`` says; of
hospitals 0, 3 and 4 the column says 0 for training and 1 for in-distribution validation. Training
here is WILDS ``train`` (302,436 images), test is WILDS ``test`` (85,054); the paper's 34,904
validation images are WILDS ``val``, hospital 1. Neither validation set is used.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from sapf_ray.config import DataConfig
from sapf_ray.data.base import Split, register
from sapf_ray.data.catalog import CATALOG
from sapf_ray.data.files import (
    FileIndex,
    ImageFiles,
    Stamp,
    check_labels,
    first_existing,
    required_path,
    stamp,
)
from sapf_ray.errors import DataError

VAL_CENTER, TEST_CENTER = 1, 2
TRAIN_SPLIT = 0
N_PUBLISHED = 455_954
_ROW = CATALOG["camelyon"]
_FOLDER = "camelyon17_v1.0"
_NUMBERS = ("node", "x_coord", "y_coord", "tumor", "center", "split")


@register("camelyon")
class Camelyon(ImageFiles):
    """Label 1 where the central 32x32 pixels hold tumor tissue. Opening reads ``metadata.csv``, no
    image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: ``metadata.csv`` is missing or not in the published format; names it.
    """

    row = _ROW

    def __init__(self, config: DataConfig) -> None:
        root = required_path(config, _ROW)
        self.root = root / _FOLDER if (root / _FOLDER).is_dir() else root
        self.lists = (first_existing(self.root, ("metadata.csv",), row=_ROW),)
        first_existing(self.root, ("patches",), row=_ROW)
        self.class_names, self.prompts = _ROW.class_names, _ROW.prompts
        paths = self.index().paths
        self.n_train, self.n_test = len(paths["train"]), len(paths["test"])

    def index(self) -> FileIndex:
        return _index(self.lists[0], stamp(self.lists[0]))

    def verify(self) -> None:
        self.check_published_sizes(len(_metadata(self.lists[0])), N_PUBLISHED)
        super().verify()


@lru_cache(maxsize=2)
def _index(path: Path, _stamp: Stamp) -> FileIndex:
    table = _metadata(path)
    center, split = (table[name].to_numpy() for name in ("center", "split"))
    labels = check_labels(
        table["tumor"].to_numpy(), 2, where=f"{path}: column tumor", obtain=_ROW.obtain
    )
    patient, node, x, y = (
        pc.cast(table[name], pa.string()) for name in ("patient", "node", "x_coord", "y_coord")
    )
    folder = pc.binary_join_element_wise("patches/patient_", patient, "_node_", node, "/", "")
    file = pc.binary_join_element_wise(
        "patch_patient_", patient, "_node_", node, "_x_", x, "_y_", y, ".png", ""
    )
    paths = pc.binary_join_element_wise(folder, file, "").combine_chunks()
    members: dict[Split, np.ndarray] = {
        "train": (split == TRAIN_SPLIT) & (center != VAL_CENTER) & (center != TEST_CENTER),
        "test": center == TEST_CENTER,
    }
    index = FileIndex({}, {})
    for name, member in members.items():
        rows = np.flatnonzero(member)
        if not len(rows):
            wanted = (
                f"center {TEST_CENTER}"
                if name == "test"
                else f"split {TRAIN_SPLIT} and a training hospital"
            )
            raise DataError(f"{path}: no {name} image (rows of {wanted}); {_ROW.obtain}")
        index.paths[name] = paths.take(pa.array(rows))
        index.labels[name] = labels[rows]
    return index


def _metadata(path: Path) -> pa.Table:
    """Columns patient (string: its leading zeros are part of file names) and integers of
    ``metadata.csv``.
    """
    types = {"patient": pa.string(), **dict.fromkeys(_NUMBERS, pa.int64())}
    try:
        table = csv.read_csv(
            path,
            convert_options=csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not the published table with columns {', '.join(types)} ({reason}); {_ROW.obtain}"
        ) from error
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path}: empty cells; the file is damaged, {_ROW.obtain}")
    return table
