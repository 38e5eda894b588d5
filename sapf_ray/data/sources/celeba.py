"""CelebA, aligned and cropped faces, labelled by the attribute Male.

Layouts, in ``data.path`` or its sub-folder ``celeba``::

    img_align_celeba/000001.jpg …   list_attr_celeba.txt   list_eval_partition.txt     as
    torchvision unpacks it Img/img_align_celeba/ …         Anno/list_attr_…       Eval/list_eval_…
             as published img_align_celeba/img_align_celeba/ …                   list_attr_….csv,
             list_eval_….csv    Kaggle's copy

Partition 0 trains, 2 tests, 1 (validation) stays unused. Images are 178x218; as in DPImageBench
(``data/preprocess_dataset.py``, ``center-crop``) the central 178x178 (rows 20 to 197) is kept and
resized. DPImageBench resizes with a Lanczos filter, this program with the bilinear one it uses
everywhere. The paper's 256 pixels are an enlargement.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from sapf_ray.config import DataConfig
from sapf_ray.data.base import Split, register
from sapf_ray.data.catalog import CATALOG
from sapf_ray.data.files import FileIndex, ImageFiles, Stamp, first_existing, required_path, stamp
from sapf_ray.errors import DataError

ATTRIBUTE = "Male"
N_PUBLISHED = 202_599
_ROW = CATALOG["celeba"]
_PARTS: dict[Split, int] = {"train": 0, "test": 2}
_IMAGES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")


@register("celeba")
class CelebA(ImageFiles):
    """Label 0 female, 1 male. Opening reads the two lists (about 30 MB as published), no image.

    Raises:
        ConfigError: ``data.path`` is not given.
        DataError: A file is missing or not in the published format; names it.
    """

    row = _ROW

    def __init__(self, config: DataConfig) -> None:
        root = required_path(config, _ROW)
        self.root = root / "celeba" if (root / "celeba").is_dir() else root
        self.folder = first_existing(self.root, _IMAGES, row=_ROW).relative_to(self.root).as_posix()
        self.lists = tuple(
            first_existing(
                self.root, (f"{name}.txt", f"{part}/{name}.txt", f"{name}.csv"), row=_ROW
            )
            for part, name in (("Anno", "list_attr_celeba"), ("Eval", "list_eval_partition"))
        )
        self.class_names, self.prompts = _ROW.class_names, _ROW.prompts
        paths = self.index().paths
        self.n_train, self.n_test = len(paths["train"]), len(paths["test"])

    def index(self) -> FileIndex:
        attributes, partition = self.lists
        return _index(self.folder, attributes, stamp(attributes), partition, stamp(partition))

    def verify(self) -> None:
        total = len(_table(self.lists[1], None)[0])
        self.check_published_sizes(total, N_PUBLISHED)
        super().verify()


@lru_cache(maxsize=2)
def _index(folder: str, attributes: Path, _a: Stamp, partition: Path, _p: Stamp) -> FileIndex:
    names, male = _table(attributes, ATTRIBUTE)
    order = np.argsort(names, kind="stable")
    names, male = names[order], male[order]
    listed, parts = _table(partition, None)
    order = np.argsort(listed, kind="stable")
    listed, parts = listed[order], parts[order]
    if len(names) != len(listed) or (names != listed).any():
        raise DataError(
            f"{partition}: lists other images ({len(listed)}) than {attributes.name} ({len(names)}); {_ROW.obtain}"
        )
    if (names[1:] == names[:-1]).any():
        raise DataError(f"{attributes}: lists an image twice; {_ROW.obtain}")
    for path, values, allowed in ((attributes, male, (-1, 0, 1)), (partition, parts, (0, 1, 2))):
        if not np.isin(values, allowed).all():
            raise DataError(
                f"{path}: values must be among {', '.join(map(str, allowed))}; {_ROW.obtain}"
            )
    index = FileIndex({}, {})
    for split, part in _PARTS.items():
        rows = parts == part
        if not rows.any():
            raise DataError(f"{partition}: no image of partition {part} ({split}); {_ROW.obtain}")
        index.paths[split] = pa.array(
            [f"{folder}/{name.decode()}" for name in names[rows]], pa.string()
        )
        index.labels[split] = (male[rows] == 1).astype(np.int64)
    return index


def _table(path: Path, column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Image names (bytes) and one integer column of a list: the named one, or the only one.

    A .txt list of attributes starts with a line that counts its rows and a line of column names;
    the .txt partition starts with neither. A .csv starts with column names, ``image_id`` first.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as a text list ({type(error).__name__}); {_ROW.obtain}"
        ) from error
    comma = "," if path.suffix == ".csv" else None
    start, position = 0, 1
    count = None
    if comma:
        header = lines[0].split(comma) if lines else []
        if not header or header[0].strip() != "image_id":
            raise DataError(
                f"{path}: first line must name the columns, image_id first; {_ROW.obtain}"
            )
        start, position = 1, _position(path, [h.strip() for h in header], column=column)
    elif column is not None:
        if len(lines) < 2 or not lines[0].strip().isdigit():
            raise DataError(
                f"{path}: first line must be the number of rows, second the column names; {_ROW.obtain}"
            )
        count, start, position = (
            int(lines[0]),
            2,
            _position(path, ["", *lines[1].split()], column=column),
        )
    names, values = [], np.empty(max(len(lines) - start, 0), np.int8)
    for number, line in enumerate(lines[start:]):
        cells = line.split(comma)
        try:
            names.append(cells[0].encode())
            values[number] = int(cells[position])
        except (IndexError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: line {start + number + 1} is not an image name and its values; {_ROW.obtain}"
            ) from error
    if count is not None and count != len(names):
        raise DataError(
            f"{path}: announces {count} rows, has {len(names)}; the file is cut off, {_ROW.obtain}"
        )
    return np.array(names, dtype=bytes), values


def _position(path: Path, header: list[str], *, column: str | None) -> int:
    if column is None:
        return 1
    if column not in header:
        raise DataError(f"{path}: no column {column}; {_ROW.obtain}")
    return header.index(column)
