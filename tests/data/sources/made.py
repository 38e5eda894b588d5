"""Every format that a source reads, written small and as its publishers do, or with a fault."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapf_ray.data.catalog import DATA_SETS
from tests.data.folders import some
from tests.data.sources.made_archives import Build, arrow, cut, damaged, eurosat, webdataset
from tests.data.sources.published import (
    cifar_batch,
    hf_table,
    octmnist_arrays,
    python2_pickle,
    write_camelyon,
    write_celeba,
    write_cifar10,
    write_parquet,
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A source.

    Attributes:
        build: Writes it ``right``, or with a fault (``truncated``, wrong ``labels``, wrong
            ``dtype``, a part ``missing``); returns ``data.path``.
        sizes: Training and test records; their sum where a hash splits them.
        classes: Names of its first classes.
        words: What the line about each fault holds.
        unreadable: The fault that leaves some training images unreadable; none where images lie in
            one array.
    """

    build: Build
    sizes: tuple[int, ...]
    classes: tuple[str, ...]
    words: dict[str, str]
    unreadable: str = ""


def idx(array: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def idx_files(packed: bool, folder: str = "") -> Build:
    def build(root: Path, fault: str) -> Path:
        rng = np.random.default_rng(3)
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        end = ".gz" if packed else ""
        for part, n in (("train", 20), ("t10k", 8)):
            pixels = rng.integers(0, 256, (n, 28, 28), np.uint8)
            labels = np.arange(n, dtype=np.uint8) % 10
            if fault == "labels":
                labels[3] = 10
            code = 13 if fault == "dtype" else 8
            for name, content in (
                (f"{part}-images-idx3-ubyte", idx(pixels, code)),
                (f"{part}-labels-idx1-ubyte", idx(labels)),
            ):
                (place / (name + end)).write_bytes(gzip.compress(content) if packed else content)
        path = place / f"train-images-idx3-ubyte{end}"
        if fault == "truncated":
            cut(path)
        if fault == "missing":
            path.unlink()
        return root

    return build


def cifar100(root: Path, fault: str) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(4)
    for name, n in (("train", 20), ("test", 8)):
        batch = cifar_batch(np.arange(n), rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        fine = [int(label) for label in batch.pop(b"labels")]
        if fault == "labels":
            fine[2] = 100
        if fault == "dtype":
            batch[b"data"] = batch[b"data"][:, :3000].copy()
        batch |= {b"fine_labels": fine, b"coarse_labels": [label % 20 for label in range(n)]}
        (folder / name).write_bytes(python2_pickle(batch))
    meta = {
        b"fine_label_names": [name.encode() for name in DATA_SETS["cifar100"].class_names],
        b"coarse_label_names": [n.encode() for n in DATA_SETS["cifar100_coarse"].class_names],
    }
    (folder / "meta").write_bytes(python2_pickle(meta))
    if fault == "truncated":
        cut(folder / "train")
    if fault == "missing":
        (folder / "train").unlink()
    return root


def cifar10(root: Path, fault: str) -> Path:
    folder = root / "cifar-10-batches-py"
    write_cifar10(folder)
    if fault == "labels":
        pixels = np.zeros((2, 32, 32, 3), np.uint8)
        (folder / "data_batch_1").write_bytes(python2_pickle(cifar_batch([0, 10], pixels)))
    if fault == "dtype":
        batch = {b"labels": [1], b"data": np.zeros((1, 3072), np.int16)}
        (folder / "data_batch_1").write_bytes(python2_pickle(batch))
    if fault == "truncated":
        cut(folder / "data_batch_1")
    if fault == "missing":
        (folder / "data_batch_1").unlink()
    return root


def npz_file(name: str, keys: str = "{split}_images {split}_labels", **changes: Any) -> Build:
    """An .npz file of 40 training and 6 test images."""

    def build(root: Path, fault: str) -> Path:
        path = root / f"{name}.npz"
        made = octmnist_arrays()
        arrays = {}
        for split in ("train", "test"):
            images, labels = (key.format(split=split) for key in keys.split())
            arrays[images] = made[f"{split}_images"]
            arrays[labels] = made[f"{split}_labels"] % 2
        first, second = list(arrays)[:2]
        arrays |= changes
        if fault == "labels":
            arrays[second] = arrays[second].astype(np.float32)
        if fault == "dtype":
            arrays[first] = np.array([[object()]] * 40)
        if fault == "missing":
            del arrays[first]
        np.savez_compressed(path, **arrays)
        if fault == "truncated":
            cut(path)
        return path

    return build


def parquet(root: Path, fault: str) -> Path:
    write_parquet(root)
    first = root / "train-00000-of-00002.parquet"
    if fault == "labels":
        pq.write_table(hf_table(range(4), [0, 1, 2, 1]), first)
    if fault == "image":
        pq.write_table(damaged(pq.read_table(first)), first, row_group_size=10)
    if fault == "dtype":
        table = pq.read_table(first)
        pq.write_table(table.set_column(1, "label", pa.array(["a"] * len(table))), first)
    if fault == "truncated":
        cut(first)
    if fault == "missing":
        first.unlink()
    return root


def image_folder(root: Path, fault: str) -> Path:
    some(root, "train/cat", "train/dog", "test/cat", "test/dog", n=3)
    first = root / "train" / "cat" / "00.png"
    if fault == "truncated":
        cut(first)
    if fault == "labels":
        some(root, "train/owl", n=1)
    if fault == "dtype":
        first.write_bytes(b"no image")
    if fault == "missing":
        first.unlink()
        first.symlink_to(root / "gone.png")
    return root


def celeba(root: Path, fault: str) -> Path:
    write_celeba(root)
    image = root / "img_align_celeba" / "000001.jpg"
    listed = root / "list_attr_celeba.txt"
    if fault == "truncated":
        cut(image, 0.3)
    if fault == "labels":
        listed.write_text(listed.read_text().replace("  1", "  7"))
    if fault == "dtype":
        image.write_bytes(b"no image")
    if fault == "missing":
        image.unlink()
    return root


def camelyon(root: Path, fault: str) -> Path:
    write_camelyon(root)
    image = next((root / "patches" / "patient_004_node_4").glob("*_x_3328_*"))
    if fault == "truncated":
        cut(image)
    if fault == "labels":
        path = root / "metadata.csv"
        path.write_text(path.read_text().replace(",3328,21792,1,", ",3328,21792,5,"))
    if fault == "dtype":
        image.write_bytes(b"no image")
    if fault == "missing":
        image.unlink()
    return root


_IDX_WORDS = {
    "truncated": "train-images-idx3-ubyte",
    "labels": "[0, 10)",
    "dtype": "not an IDX file of bytes",
    "missing": "train-images-idx3-ubyte",
}
_NPZ_WORDS = {"truncated": "not a readable .npz", "labels": "float32", "dtype": "Python objects"}
_TAR_WORDS = {
    "truncated": "train-000001.tar",
    "labels": "s0003",
    "dtype": "s0000.png: cannot be read as an image",
    "missing": "s0003 has 0 images",
}
_FILE_WORDS = {
    "truncated": "cannot be read as an image",
    "dtype": "cannot be read as an image",
}

SOURCES: dict[str, Made] = {
    "cifar10": Made(
        build=cifar10,
        sizes=(35, 7),
        classes=("airplane", "automobile"),
        words={
            "truncated": "data_batch_1",
            "labels": "[0, 10)",
            "dtype": "uint8",
            "missing": "data_batch_1: no such file",
        },
    ),
    "cifar100": Made(
        build=cifar100,
        sizes=(20, 8),
        classes=("apple", "aquarium_fish"),
        words={
            "truncated": "cifar-100-python/train",
            "labels": "[0, 100)",
            "dtype": "3072",
            "missing": "train: no such file",
        },
    ),
    "cifar100_coarse": Made(
        build=cifar100,
        sizes=(20, 8),
        classes=("aquatic_mammals", "fish"),
        words={"truncated": "train", "dtype": "3072", "missing": "train: no such file"},
    ),
    "mnist": Made(
        build=idx_files(True),
        sizes=(20, 8),
        classes=("zero", "one"),
        words=_IDX_WORDS | {"truncated": ".gz file"},
    ),
    "fashion_mnist": Made(
        build=idx_files(False, "FashionMNIST/raw"),
        sizes=(20, 8),
        classes=("T-shirt/top", "Trouser"),
        words=_IDX_WORDS | {"truncated": "cut off"},
    ),
    "pathmnist": Made(
        build=npz_file("pathmnist_64"),
        sizes=(40, 6),
        classes=("adipose", "background"),
        words=_NPZ_WORDS | {"missing": "no array train_images"},
    ),
    "eurosat": Made(
        build=eurosat(False),
        sizes=(60,),
        classes=("AnnualCrop", "Forest"),
        unreadable="dtype",
        words=_FILE_WORDS | {"labels": "no images of River", "missing": "no images of River"},
    ),
    "eurosat/zip": Made(
        build=eurosat(True),
        sizes=(60,),
        classes=("AnnualCrop", "Forest"),
        unreadable="dtype",
        words={
            "truncated": "not a readable .zip",
            "labels": "no images of River",
            "dtype": "EuroSAT_RGB.zip, EuroSAT_RGB/Forest/Forest_1.jpg",
            "missing": "no images of River",
        },
    ),
    "npz": Made(
        build=npz_file("mine"),
        sizes=(40, 6),
        classes=("0", "1"),
        words=_NPZ_WORDS | {"missing": "expected train_images"},
    ),
    "npz/keras": Made(
        build=npz_file("mnist", "x_{split} y_{split}", class_names=np.array(["an eye", "an ear"])),
        sizes=(40, 6),
        classes=("an eye", "an ear"),
        words=_NPZ_WORDS | {"missing": "x_test"},
    ),
    "webdataset": Made(
        build=webdataset("cls"),
        sizes=(20, 6),
        classes=("cat", "tabby_dog"),
        unreadable="dtype",
        words=_TAR_WORDS,
    ),
    "webdataset/txt": Made(
        build=webdataset("txt"),
        sizes=(20, 6),
        classes=("cat", "tabby_dog"),
        unreadable="dtype",
        words=_TAR_WORDS,
    ),
    "webdataset/json": Made(
        build=webdataset("json"),
        sizes=(20, 6),
        classes=("cat", "tabby_dog"),
        unreadable="dtype",
        words=_TAR_WORDS,
    ),
    "arrow": Made(
        build=arrow,
        sizes=(20, 6),
        classes=("cat", "tabby_dog"),
        unreadable="image",
        words={
            "truncated": "not a readable Arrow stream",
            "labels": "[0, 2)",
            "dtype": "label must be integers",
            "missing": "data-00000-of-00002.arrow",
        },
    ),
    "parquet": Made(
        build=parquet,
        sizes=(40, 6),
        classes=("cat", "tabby_dog"),
        unreadable="image",
        words={
            "truncated": "not a readable Parquet",
            "labels": "[0, 2)",
            "dtype": "label must be integers",
            "missing": "train-00000-of-00002.parquet: no such file",
        },
    ),
    "image_folder": Made(
        build=image_folder,
        sizes=(6, 6),
        classes=("cat", "dog"),
        unreadable="dtype",
        words=_FILE_WORDS | {"labels": "only one has owl", "missing": "00.png"},
    ),
    "celeba": Made(
        build=celeba,
        sizes=(7, 3),
        classes=("female", "male"),
        unreadable="dtype",
        words=_FILE_WORDS | {"labels": "values must be among", "missing": "no such file"},
    ),
    "camelyon": Made(
        build=camelyon,
        sizes=(5, 3),
        classes=("normal", "tumor"),
        unreadable="dtype",
        words=_FILE_WORDS | {"labels": "[0, 2)", "missing": "no such file"},
    ),
}
"""Source (and way of writing it) → how it is made."""
