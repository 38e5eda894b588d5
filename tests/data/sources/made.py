"""Every format that a source reads, written small and as its publishers do, or with a fault."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sapf_ray.data.catalog import DATA_SETS
from tests.data.folders import some
from tests.data.sources.published import (
    cifar_batch,
    hf_table,
    octmnist_arrays,
    png,
    python2_pickle,
    write_camelyon,
    write_celeba,
    write_cifar10,
    write_parquet,
)

Build = Callable[[Path, str], Path]


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


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


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


def eurosat(zipped: bool) -> Build:
    def build(root: Path, fault: str) -> Path:
        names = DATA_SETS["eurosat"].class_names
        files = {}
        for label, name in enumerate(names):
            for i in range(1, 7):
                sink = io.BytesIO()
                Image.new("RGB", (64, 64), (20 * label, i, 90)).save(sink, format="JPEG")
                files[f"EuroSAT_RGB/{name}/{name}_{i}.jpg"] = sink.getvalue()
        if fault == "missing":
            files = {name: content for name, content in files.items() if "/River/" not in name}
        if fault == "labels":
            files = {name.replace("River", "Fluss"): content for name, content in files.items()}
        if fault == "dtype":
            files["EuroSAT_RGB/Forest/Forest_1.jpg"] = b"no image"
        if not zipped:
            if fault == "truncated":
                name = "EuroSAT_RGB/Forest/Forest_1.jpg"
                files[name] = files[name][: len(files[name]) // 2]
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            return root
        path = root / "EuroSAT_RGB.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        if fault == "truncated":
            cut(path)
        return path

    return build


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shard_members(values: range, kind: str = "cls", fault: str = "right") -> list:
    """Samples as webdataset's TarWriter writes them: key by key, kinds sorted."""
    members = []
    for value in values:
        word = ("cat", "tabby_dog")[value % 2]
        text = {
            "cls": str(value % 2),
            "txt": word,
            "json": json.dumps({"label": word, "id": value}),
        }[kind]
        if fault == "labels" and value == 3:
            text = "" if kind != "json" else "{}"
        image = b"no image" if fault == "dtype" and value < 2 else png(value)
        members += [(f"s{value:04d}.{kind}", text.encode()), (f"s{value:04d}.png", image)]
    if fault == "missing":
        members = [row for row in members if row[0] != "s0003.png"]
    return members


def webdataset(kind: str) -> Build:
    def build(root: Path, fault: str) -> Path:
        for name, values in (
            ("train-000000", range(12)),
            ("train-000001", range(12, 20)),
            ("test-000000", range(200, 206)),
        ):
            write_tar(root / f"{name}.tar", shard_members(values, kind, fault))
        if kind == "cls":
            (root / "classnames.txt").write_text("cat\ntabby_dog\n")
        if fault == "truncated":
            cut(root / "train-000001.tar", 0.3)
        return root

    return build


def save_to_disk(folder: Path, table: pa.Table, name: str, shards: int = 2) -> None:
    """As ``Dataset.save_to_disk`` of datasets 3 writes it."""
    folder.mkdir(parents=True)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    files = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    step = -(-len(table) // shards)
    for i, file in enumerate(files):
        with pa.OSFile(str(folder / file), "wb") as sink:
            part = table.slice(i * step, step)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(part, max_chunksize=7)
    state = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": name,
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def damaged(table: pa.Table) -> pa.Table:
    """The first two images are none."""
    rows = table["image"].to_pylist()
    rows[:2] = [{**row, "bytes": b"no image"} for row in rows[:2]]
    return table.set_column(0, table.schema.field("image"), pa.array(rows, table.schema[0].type))


def arrow(root: Path, fault: str) -> Path:
    for split, values in (("train", range(20)), ("test", range(200, 206))):
        labels = [value % 2 for value in values]
        if fault == "labels":
            labels[1] = 2
        table = damaged(hf_table(values, labels)) if fault == "image" else hf_table(values, labels)
        if fault == "dtype":
            column = pa.array([str(label) for label in labels])
            metadata = table.schema.metadata
            table = table.set_column(1, "label", column).replace_schema_metadata(metadata)
        save_to_disk(root / split, table, split)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    first = root / "train" / "data-00000-of-00002.arrow"
    if fault == "truncated":
        cut(first)
    if fault == "missing":
        first.unlink()
    return root


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
