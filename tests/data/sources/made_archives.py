"""Archives and folders of other libraries, written small and as these do, or with a fault."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from PIL import Image

from sapf_ray.data.catalog import DATA_SETS
from tests.data.sources.published import hf_table, png

Build = Callable[[Path, str], Path]


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


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
