"""Parquet as Hugging Face datasets writes it, and this program's own synthetic shards."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapf_ray.data import parquet
from sapf_ray.errors import DataError
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import write_shard
from tests.data.sources.published import hf_table, open_named, png, read_all, refusal, write_parquet


def values(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("place", ["", "data"])
def test_reads_what_was_written(tmp_path, place):
    write_parquet(tmp_path / place)
    source = open_named("parquet", tmp_path)
    assert (source.class_names, source.n_train, source.n_test) == (("cat", "tabby_dog"), 40, 6)
    assert source.prompts == ("An image of cat", "An image of tabby dog")
    for split, first in (("train", 0), ("test", 200)):
        images, labels = read_all(source, split, 6)
        assert values(images) == list(range(first, first + len(images)))
        assert labels.tolist() == [v % 2 for v in values(images)] == source.labels(split).tolist()
    images, labels = source.read("train", np.array([39, 5, 24, 25, 5]), resolution=9)
    assert (
        images.shape == (5, 9, 9, 3)
        and values(images) == [39, 5, 24, 25, 5]
        and labels.tolist() == [1, 1, 0, 1, 1]
    )
    assert source.read("train", np.array([], int), resolution=9)[0].shape == (0, 9, 9, 3)
    with pytest.raises(IndexError):
        source.read("test", np.array([6]), resolution=9)
    source.verify()


def test_folders_per_split_other_column_names_and_plain_binary(tmp_path):
    for split, start in (("train", 0), ("test", 50)):
        (tmp_path / "default" / split).mkdir(parents=True)
        rows = [png(v) for v in range(start, start + 4)]
        table = pa.table({"img": rows, "label": pa.array([0, 2, 1, 0], pa.int32())})
        pq.write_table(table, tmp_path / "default" / split / "0000.parquet")
    source = open_named("parquet", tmp_path, prompt_template="class {name}")
    assert source.class_names == ("0", "1", "2") and source.prompts[2] == "class 2"
    images, labels = read_all(source, "test", 6)
    assert values(images) == [50, 51, 52, 53] and labels.tolist() == [0, 2, 1, 0]


def test_columns_are_found_by_their_features(tmp_path):
    write_parquet(tmp_path, image="photo", label="species")
    assert values(read_all(open_named("parquet", tmp_path), "test", 6)[0]) == list(range(200, 206))


def test_opening_decodes_nothing_and_pickles_small(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    monkeypatch.setattr(parquet, "decode", lambda *a: pytest.fail("an image was decoded"))
    monkeypatch.setattr(parquet.RowGroup, "decode", lambda *a: pytest.fail("a row group was read"))
    source = open_named("parquet", tmp_path)
    assert source.fingerprint() == open_named("parquet", tmp_path).fingerprint()
    packed = pickle.dumps(source)
    assert len(packed) < 4000
    monkeypatch.undo()
    assert values(read_all(pickle.loads(packed), "train", 6)[0]) == list(range(40))


def test_only_the_requested_row_groups_are_read(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    source = open_named("parquet", tmp_path)
    read = []
    decoded = []
    decode_group = parquet.RowGroup.decode
    decode = parquet.decode

    def noting_group(group, *args):
        read.append((group.path.name[:11], group.number))
        return decode_group(group, *args)

    def noting_image(*args, name, **options):
        decoded.append(name)
        return decode(*args, name=name, **options)

    monkeypatch.setattr(parquet.RowGroup, "decode", noting_group)
    monkeypatch.setattr(parquet, "decode", noting_image)
    source.read("train", np.array([36, 22, 21]), resolution=6)
    assert read == [("train-00000", 2), ("train-00001", 1)]
    assert len(decoded) == 3


def test_fingerprint_follows_the_files(tmp_path):
    write_parquet(tmp_path)
    first = open_named("parquet", tmp_path).fingerprint()
    pq.write_table(hf_table(range(7), [0] * 7), tmp_path / "test-00000-of-00001.parquet")
    assert open_named("parquet", tmp_path).fingerprint() != first


def test_without_test_files_a_record_s_own_path_decides(tmp_path):
    def members(rows):
        pq.write_table(
            hf_table(rows, [v % 2 for v in rows]), tmp_path / "train.parquet", row_group_size=16
        )
        source = open_named("parquet", tmp_path, test_fraction=0.4)
        source.verify()
        return {split: set(values(read_all(source, split, 6)[0])) for split in ("train", "test")}

    before = members(list(range(1, 100)))
    after = members(list(range(100)))  # one more record, at the start
    assert before["train"] <= after["train"] and before["test"] <= after["test"]
    assert (
        not after["train"] & after["test"]
        and len(after["train"] | after["test"]) == 100
        and 20 < len(after["test"]) < 60
    )
    one_file = open_named("parquet", tmp_path / "train.parquet", test_fraction=0.4)
    assert set(values(read_all(one_file, "test", 6)[0])) == after["test"]


def test_without_test_files_and_paths(tmp_path):
    pq.write_table(hf_table(range(9), [0, 1, 0] * 3, paths=False), tmp_path / "train.parquet")
    assert "no test files" in refusal("parquet", tmp_path)


def test_own_synthetic_shards(tmp_path):
    plan = SamplingPlan(n_images=24, n_classes=2, shard_size=10, seed=3)
    for shard in plan.shards:
        images = np.stack(
            [np.full((6, 6, 3), shard.start + i, np.uint8) for i in range(shard.rows)]
        )
        write_shard(
            tmp_path,
            plan,
            shard=shard,
            images=images,
            class_names=("a", "b"),
            prompts=("an a", "a b"),
            spec="spec",
        )
    source = open_named("parquet", tmp_path, test_fraction=0.3)
    found = [values(read_all(source, split, 6)[0]) for split in ("train", "test")]
    assert sorted(found[0] + found[1]) == list(range(24)) and source.class_names == ("a", "b")
    labels = np.concatenate([plan.labels(shard) for shard in plan.shards])
    assert source.labels("test").tolist() == [labels[v] for v in found[1]]


def test_a_missing_shard_is_named(tmp_path):
    write_parquet(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    assert "train-00000-of-00002.parquet: no such file" in refusal("parquet", tmp_path)


def test_two_data_sets_in_one_folder(tmp_path):
    write_parquet(tmp_path / "a")
    write_parquet(tmp_path / "b")
    assert f"several folders ({tmp_path}/a, {tmp_path}/b)" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, kind):
    write_parquet(tmp_path)
    path = tmp_path / "train-00001-of-00002.parquet"
    path.write_bytes({"truncated": path.read_bytes()[:-200], "empty": b"", "text": b"hello"}[kind])
    assert f"{path}: not a readable Parquet file" in refusal("parquet", tmp_path)


def test_damaged_pages_and_images(tmp_path):
    write_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    rows = [
        {"bytes": png(1), "path": "a"},
        {"bytes": b"no image", "path": "b"},
        {"bytes": None, "path": "c.png"},
    ]
    schema = hf_table([1], [0]).schema
    for count, words in ((2, "cannot be read as an image"), (3, "row 2: no image bytes")):
        shown = rows[:2] if count == 2 else [rows[0], rows[0], rows[2]]
        pq.write_table(pa.table({"image": shown, "label": [0] * count}, schema=schema), path)
        assert str(path) in refusal("parquet", tmp_path) and words in refusal("parquet", tmp_path)
        with pytest.raises(DataError, match=f"row {count - 1}"):
            read_all(open_named("parquet", tmp_path), "test", 6)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (hf_table([1, 2], [0, 2]), "labels must lie in [0, 2)"),
        (hf_table([1, 2], [0, -1]), "labels must lie in [0, 2)"),
        (hf_table([1, 2], [0, 1], names=("cat", "dog")), "other columns or class names"),
        (pa.table({"image": ["a", "b"], "label": [0, 1]}), "must be binary"),
        (pa.table({"image": [b"a", b"b"], "label": ["x", "y"]}), "must be integers"),
        (pa.table({"picture": [b"a"], "label": [0]}), "columns are picture, label"),
        (
            pa.table({"image": [b"a", b"b"], "kind": [0, 1]}),
            "expected a ClassLabel column called label",
        ),
        (hf_table([1, 2], [0, None]), "1 empty cells"),
        (
            hf_table([1], [0]).replace_schema_metadata({"huggingface": "{"}),
            "metadata key huggingface",
        ),
    ],
)
def test_other_columns(tmp_path, table, words):
    write_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(table, path)
    message = refusal("parquet", tmp_path)
    assert words in message, message


def test_nothing_there_and_one_class(tmp_path):
    assert "no training files" in refusal("parquet", tmp_path)
    pq.write_table(hf_table([1, 2], [0, 0], names=("cat",)), tmp_path / "train.parquet")
    assert "only one class" in refusal("parquet", tmp_path)
