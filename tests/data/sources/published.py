"""Small data sets written just as their publishers write them."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data import ImageSource, open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import SapfError


class Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """Protocol 2 as Python 2 and numpy 1 wrote it.

    Every string a byte string, modules by their old names.
    """

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, obj):
        raw = obj if isinstance(obj, bytes) else obj.encode("ascii")
        short = len(raw) < 256
        self.write(
            (b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw))) + raw
        )
        self.memoize(obj)

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(b"c" + module.encode() + b"\n" + (name or obj.__qualname__).encode() + b"\n")
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(obj: object) -> bytes:
    sink = io.BytesIO()
    Python2Pickler(sink, protocol=2).dump(obj)
    return sink.getvalue()


def cifar_batch(labels, pixels, name="training batch 1 of 5") -> dict:
    """As the publisher's: pixels uint8 (n, 32, 32, 3) as three planes."""
    return {
        b"batch_label": name.encode(),
        b"labels": [int(label) for label in labels],
        b"data": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), 3072),
        b"filenames": [b"leptodactylus_pentadactylus_s_%06d.png" % i for i in range(len(pixels))],
    }


def write_cifar10(folder: Path, per_file: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Writes all batches; returns all images (train then test) and labels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6 * per_file, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 6 * per_file)
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        rows = slice(i * per_file, (i + 1) * per_file)
        (folder / name).write_bytes(python2_pickle(cifar_batch(labels[rows], pixels[rows])))
    meta = {
        b"num_cases_per_batch": per_file,
        b"label_names": [n.encode() for n in DATA_SETS["cifar10"].class_names],
        b"num_vis": 3072,
    }
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return pixels, labels


def octmnist_arrays(n=40, side=28, channels=()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {}
    for split, rows in (("train", n), ("val", 5), ("test", 6)):
        # smooth, so that it deflates as images do
        base = rng.integers(0, 200, (rows, 1, 1, *(1 for _ in channels)))
        ramp = np.arange(side).reshape(1, 1, side, *(1 for _ in channels))
        noise = rng.integers(0, 8, (rows, side, side, *channels))
        arrays[f"{split}_images"] = (base + ramp + noise).clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 4, (rows, 1)).astype(np.uint8)
    return arrays


ATTRIBUTES = ("5_o_Clock_Shadow", "Male", "Young")
PARTITION = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 0]
MALE = [1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1, -1]


def face(i: int) -> Image.Image:
    """178x218: rows that the customary crop drops are white, the rest is as grey as i says."""
    pixels = np.full((218, 178, 3), 255, np.uint8)
    pixels[20:198] = 10 * i
    return Image.fromarray(pixels)


def write_celeba(root: Path, kaggle: bool = False) -> None:
    images = root / "img_align_celeba" / ("img_align_celeba" if kaggle else "")
    images.mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(len(PARTITION))]
    for i, name in enumerate(names):
        face(i).save(images / name, quality=95)
    rows = [(name, [-1, male, 1]) for name, male in zip(names, MALE, strict=True)]
    if kaggle:
        lines = [
            ",".join(["image_id", *ATTRIBUTES]),
            *(",".join([n, *map(str, v)]) for n, v in rows),
        ]
        parts = ["image_id,partition", *(f"{n},{p}" for n, p in zip(names, PARTITION, strict=True))]
    else:  # aligned by further blanks, as published
        lines = [
            str(len(names)),
            " ".join(ATTRIBUTES) + " ",
            *(n + "".join(f" {x:2d}" for x in v) for n, v in rows),
        ]
        parts = [f"{n} {p}" for n, p in zip(names, PARTITION, strict=True)]
    suffix = "csv" if kaggle else "txt"
    (root / f"list_attr_celeba.{suffix}").write_text("\n".join(lines) + "\n")
    (root / f"list_eval_partition.{suffix}").write_text("\n".join(parts) + "\n")


# patient, node, x, y, tumor, slide, center, split: hospital 1 is validation and 2 test whatever
# split says
PATCHES = [
    ("004", 4, 3328, 21792, 1, 0, 0, 0),
    ("004", 4, 3200, 22272, 1, 0, 0, 1),
    ("009", 1, 32, 96, 0, 1, 0, 0),
    ("020", 4, 64, 64, 1, 10, 1, 0),
    ("021", 3, 64, 128, 0, 11, 1, 1),
    ("040", 1, 96, 32, 1, 20, 2, 0),
    ("042", 3, 96, 64, 0, 23, 2, 1),
    ("041", 0, 160, 64, 0, 21, 2, 0),
    ("075", 4, 0, 0, 1, 34, 3, 0),
    ("099", 4, 10016, 7, 0, 49, 4, 0),
    ("004", 4, 1, 2, 0, 0, 0, 0),
]
TRAIN_PATCHES = [0, 2, 8, 9, 10]
TEST_PATCHES = [5, 6, 7]


def patch_path(row: tuple) -> str:
    patient, node, x, y = row[:4]
    return (
        f"patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x}_y_{y}.png"
    )


def write_camelyon(root: Path) -> None:
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, row in enumerate(PATCHES):
        path = root / patch_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (96, 96), (20 * i, 5, 7, 255)).save(path)
        lines.append(",".join(map(str, (i, *row))))
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


def png(value: int, size: int = 6) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (size, size), (value, 3, 5)).save(sink, format="PNG")
    return sink.getvalue()


def hf_table(
    values,
    labels,
    *,
    image="image",
    label="label",
    names=("cat", "tabby_dog"),
    hf=True,
    paths=True,
) -> pa.Table:
    """As ``datasets`` writes it: image struct, label int64, features in the metadata."""
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    kinds = [
        (image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        (label, pa.int64()),
    ]
    schema = pa.schema(
        kinds,
        metadata={"huggingface": json.dumps({"info": {"features": features}})} if hf else None,
    )
    rows = [{"bytes": png(v), "path": f"{v:04d}.png" if paths else None} for v in values]
    return pa.table({image: rows, label: list(labels)}, schema=schema)


def write_parquet(root: Path, **kwargs) -> None:
    """Two training shards of 25 and 15 rows in row groups of 10, one test file of 6.

    Value of image i is i.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name, values in (
        ("train-00000-of-00002", range(25)),
        ("train-00001-of-00002", range(25, 40)),
        ("test-00000-of-00001", range(200, 206)),
        ("validation-00000-of-00001", range(3)),
    ):
        table = hf_table(values, [v % 2 for v in values], **kwargs)
        pq.write_table(table, root / f"{name}.parquet", row_group_size=10)


def open_named(name: str, path: Path | str, **kwargs) -> ImageSource:
    return open_source(DataConfig(source=name, path=str(path), **kwargs))


def refusal(name: str, path: Path | str, **kwargs) -> str:
    """The one line with which opening, or else verifying, is refused."""
    try:
        open_named(name, path, **kwargs).verify()
    except SapfError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("not refused")


def read_all(source: ImageSource, split: str, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    n = source.n_train if split == "train" else source.n_test
    return source.read(split, np.arange(n), resolution=resolution)  # type: ignore[arg-type]
