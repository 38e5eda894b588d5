"""One's own images in shards, Arrow folders and .npz files: layouts, classes, what is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sapf_ray.data.files import split_of
from sapf_ray.errors import SapfError
from tests.data.sources.made_archives import save_to_disk, shard_members, write_tar
from tests.data.sources.published import hf_table, octmnist_arrays, open_named, read_all, refusal


def many(root, n=60):
    """One shard without a split, one Arrow set without a split."""
    write_tar(root / "tars" / "photos-0.tar", shard_members(range(n)))
    save_to_disk(root / "arrow", hf_table(range(n), [v % 2 for v in range(n)]), "train")
    return {"webdataset": root / "tars", "arrow": root / "arrow"}


@pytest.mark.parametrize("name", ["webdataset", "arrow"])
def test_without_a_split_records_are_split_by_their_own_name(name, tmp_path):
    source = open_named(name, many(tmp_path)[name], test_fraction=0.3)
    assert source.n_train + source.n_test == 60 and source.n_test > 5
    image = {"webdataset": "s{:04d}", "arrow": "{:04d}.png"}[name]
    for split in ("train", "test"):
        values = read_all(source, split, 6)[0][:, 0, 0, 0]
        assert all(split_of(image.format(value), 0.3) == split for value in values.tolist())


class TestClassNames:
    """``data.class_names`` means the same everywhere."""

    @pytest.fixture(params=["webdataset", "arrow", "parquet", "npz"])
    def three(self, request, tmp_path):
        """Images of cats, dogs and owls; the red of image i is i, in .npz all its grey."""
        labels = {"train": [0, 1, 2, 0, 1, 2, 0], "test": [2, 1, 0, 0]}
        names = ("cat", "dog", "owl")
        for split, members in labels.items():
            table = hf_table(range(len(members)), members, names=names)
            if request.param == "webdataset":
                rows = shard_members(range(len(members)), "txt")
                texts = [row if "png" in row[0] else (row[0], b"") for row in rows]
                for i, label in enumerate(members):
                    texts[2 * i] = (texts[2 * i][0], names[label].encode())
                write_tar(tmp_path / f"{split}-0.tar", texts)
            elif request.param == "arrow":
                save_to_disk(tmp_path / split, table, split)
            elif request.param == "parquet":
                pq.write_table(table, tmp_path / f"{split}-0.parquet")
        if request.param == "arrow":
            (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        if request.param == "npz":
            arrays = {}
            for split, members in labels.items():
                levels = np.arange(len(members), dtype=np.uint8)
                arrays[f"{split}_images"] = np.tile(levels[:, None, None], (1, 6, 6))
                arrays[f"{split}_labels"] = np.array(members)
            np.savez(tmp_path / "it.npz", class_names=np.array(names), **arrays)
            return request.param, tmp_path / "it.npz"
        return request.param, tmp_path

    def test_their_order_is_that_of_the_labels(self, three):
        source = open_named(*three, class_names=("owl", "dog", "cat"))
        assert source.labels("train").tolist() == [2, 1, 0, 2, 1, 0, 2]
        assert source.prompts[0] == "An image of owl" and source.notes() == ()

    def test_a_class_may_be_without_images(self, three):
        source = open_named(*three, class_names=("cat", "dog", "emu", "owl"))
        assert source.labels("test").tolist() == [3, 1, 0, 0]

    def test_images_of_other_classes_are_left_out_and_counted(self, three):
        source = open_named(*three, class_names=("owl", "cat"))
        assert (source.n_train, source.n_test) == (5, 3)
        assert source.notes() == ("3 images have labels that data.class_names lacks",)
        images, labels = read_all(source, "train", 6)
        assert images[:, 0, 0, 0].tolist() == [0, 2, 3, 5, 6]
        assert labels.tolist() == source.labels("train").tolist() == [1, 0, 1, 0, 1]
        source.verify()
        assert len(source.inspect().report()) == 0

    def test_none_that_fits_is_refused(self, three):
        message = refusal(*three, class_names=("Hund", "Katze"))
        assert "none of data.class_names" in message and "cat, dog, owl" in message


def test_numbers_are_named_in_order(tmp_path):
    write_tar(tmp_path / "train.tar", shard_members(range(10)))
    write_tar(tmp_path / "test.tar", shard_members(range(4)))
    assert open_named("webdataset", tmp_path).class_names == ("0", "1")
    source = open_named("webdataset", tmp_path, class_names=("a", "b", "c"))
    assert source.labels("test").tolist() == [0, 1, 0, 1]
    source = open_named("webdataset", tmp_path, class_names=("1", "0"))
    assert source.labels("test").tolist() == [1, 0, 1, 0]


class TestWebDataset:
    def test_a_pattern_and_the_splits_of_folders(self, tmp_path):
        for name in ("wds/train/0", "wds/train/1", "wds/val/0", "wds/other"):
            write_tar(tmp_path / f"{name}.tar", shard_members(range(6)))
        source = open_named("webdataset", tmp_path / "wds" / "*" / "?.tar")
        assert (source.n_train, source.n_test) == (12, 6)
        message = refusal("webdataset", tmp_path / "wds" / "*.zip")
        assert "no .tar files" in message

    def test_folders_inside_a_shard_and_what_systems_leave(self, tmp_path):
        members = [(f"./cat/{name}", content) for name, content in shard_members(range(4))]
        members[:0] = [("./cat/._s0000.png", b"junk"), ("__MACOSX/x.png", b"junk")]
        for name in ("train", "test"):
            write_tar(tmp_path / f"{name}.tar", members)
        assert open_named("webdataset", tmp_path).n_train == 4

    @pytest.mark.parametrize("name", ["/etc/s0009.png", "../s0009.png", "a/../../s0009.png"])
    def test_a_member_that_leads_outside_is_refused(self, tmp_path, name):
        write_tar(tmp_path / "train.tar", [*shard_members(range(4)), (name, b"")])
        message = refusal("webdataset", tmp_path)
        assert name in message and "leads outside" in message

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
    def test_links_and_devices_are_refused(self, tmp_path, kind):
        write_tar(tmp_path / "train.tar", shard_members(range(4)))
        with tarfile.open(tmp_path / "train.tar", "a") as archive:
            info = tarfile.TarInfo("s0009.png")
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
        assert "s0009.png is a link or no plain file" in refusal("webdataset", tmp_path)

    def test_what_else_is_refused(self, tmp_path):
        path = tmp_path / "train.tar"
        good = shard_members(range(4))
        for members, words in (
            ([*good, good[1]], "do not stand together"),
            ([good[1], *good], "is there twice"),
            ([*good, ("s9.png", b"")], "s9 has no label"),
            ([*good, ("s9.cls", b"1"), ("s9.jpg", b""), ("s9.seg.png", b"")], "s9 has 2 images"),
            ([("s9.json", b'{"label": 1.5}'), ("s9.png", b"")], "must be an integer or a word"),
            ([("s9.json", b"["), ("s9.png", b"")], "s9: .json holds no label"),
            ([("s9.cls", b"1" * (2 << 20)), ("s9.png", b"")], "too many for a label"),
            ([("a.pdf", b"")], "a has 0 images"),
            ([], "no samples"),
        ):
            write_tar(path, members)
            message = refusal("webdataset", tmp_path)
            assert words in message and "train.tar" in message, message

    def test_numbers_that_count_no_classes(self, tmp_path):
        for number in (b"1000", b"10000000000", b"9" * 30, b"9" * 5000):
            members = shard_members(range(6))
            members[0] = (members[0][0], number)
            write_tar(tmp_path / "train.tar", members)
            write_tar(tmp_path / "test.tar", shard_members(range(6)))
            assert "number the classes from 0" in refusal("webdataset", tmp_path)
        (tmp_path / "classnames.txt").write_text("crane\ncrane\n")
        write_tar(tmp_path / "train.tar", shard_members(range(6)))
        assert "two classes are called crane" in refusal("webdataset", tmp_path)

    def test_captions_are_no_classes(self, tmp_path):
        members = []
        for name, content in shard_members(range(40), "txt"):
            text = f"a photo, number {name}".encode()
            members.append((name, text if name.endswith("txt") else content))
        write_tar(tmp_path / "train.tar", members)
        assert "captions?" in refusal("webdataset", tmp_path)

    def test_packed_joined_and_cut_off_shards(self, tmp_path):
        path = tmp_path / "train.tar"
        write_tar(path, shard_members(range(4)))
        content = path.read_bytes()
        path.write_bytes(gzip.compress(content))
        assert "gunzip it first" in refusal("webdataset", tmp_path)
        path.write_bytes(content + content)
        assert "were two joined?" in refusal("webdataset", tmp_path)
        ends = range(512, len(content.rstrip(b"\0")) // 512 * 512, 512)
        for end in ends:  # also where a member ends
            path.write_bytes(content[:end])
            assert "cut off" in refusal("webdataset", tmp_path)
        path.write_bytes(b"no tar" * 200)
        assert "not a readable tar file" in refusal("webdataset", tmp_path)

    def test_a_shard_that_changes_under_an_open_source(self, tmp_path):
        for name in ("train", "test"):
            write_tar(tmp_path / f"{name}.tar", shard_members(range(4)))
        source = open_named("webdataset", tmp_path, on_error="skip")
        write_tar(tmp_path / "train.tar", shard_members(range(6)))
        with pytest.raises(SapfError, match=r"train\.tar: changed since"):
            source.read("train", np.arange(4), resolution=4)

    def test_keys_that_repeat_cannot_split_records(self, tmp_path):
        for i in range(2):
            write_tar(tmp_path / f"{i}.tar", shard_members(range(4)))
        assert "keys repeat" in refusal("webdataset", tmp_path)


class TestArrow:
    def put(self, root, *splits):
        for split in splits:
            save_to_disk(root / split, hf_table(range(8), [v % 2 for v in range(8)]), split)
        (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))

    def test_validation_serves_as_test_set_where_there_is_none(self, tmp_path):
        self.put(tmp_path, "train", "validation")
        assert open_named("arrow", tmp_path).n_test == 8

    def test_what_is_refused(self, tmp_path):
        assert "no dataset_dict.json or state.json" in refusal("arrow", tmp_path)
        self.put(tmp_path, "test", "other")
        assert "no split called train" in refusal("arrow", tmp_path)
        self.put(tmp_path / "b", "train", "test")
        state = tmp_path / "b" / "train" / "state.json"
        right = state.read_text()
        for change, words in (
            ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices()"),
            ({"_data_files": [{"filename": "../../x.arrow"}]}, "lies outside"),
            ({"_data_files": []}, "names no data files"),
            ({"_data_files": 3}, "not as datasets writes it"),
        ):
            state.write_text(json.dumps({**json.loads(right), **change}))
            assert words in refusal("arrow", tmp_path / "b")
        state.write_text("{")
        assert "state.json: cannot be read" in refusal("arrow", tmp_path / "b")

    def test_files_are_mapped_not_read(self, tmp_path):
        sink = io.BytesIO()
        Image.new("RGB", (300, 300), (9, 8, 7)).save(sink, format="BMP")  # 270 kB
        rows = [{"bytes": sink.getvalue(), "path": f"{i}.bmp"} for i in range(40)]
        table = hf_table(range(40), [i % 2 for i in range(40)])
        column = pa.array(rows, table.schema[0].type)
        table = table.set_column(0, table.schema.field("image"), column)
        for split in ("train", "test"):
            save_to_disk(tmp_path / split, table, split)
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        del table, column
        before = pa.total_allocated_bytes()
        images, _ = open_named("arrow", tmp_path).read("train", np.array([39]), resolution=4)
        assert images[0, 0, 0].tolist() == [9, 8, 7]
        assert pa.total_allocated_bytes() - before < 1e6  # of 20 MB

    def test_images_that_lie_elsewhere(self, tmp_path):
        table = hf_table(range(4), [0, 1, 0, 1])
        rows = [{"bytes": None, "path": f"{i}.png"} for i in range(4)]
        column = pa.array(rows, table.schema[0].type)
        table = table.set_column(0, table.schema.field("image"), column)
        save_to_disk(tmp_path / "train", table, "train")
        save_to_disk(tmp_path / "test", table, "test")
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        assert "embed them first" in refusal("arrow", tmp_path)


class TestNpz:
    def write(self, path, **arrays):
        np.savez(path, **arrays)
        return path

    def arrays(self, images, names="train test"):
        labels = np.arange(len(images)) % 2
        parts = {}
        for split in names.split():
            parts |= {f"{split}_images": images, f"{split}_labels": labels}
        return parts

    def test_floats_and_deep_integers_by_their_public_range(self, tmp_path):
        grey = np.linspace(0, 1, 4 * 6 * 6).reshape(4, 6, 6)
        shown = (grey * 255).round().astype(np.uint8)
        path = tmp_path / "it.npz"
        for values, limits in (
            (grey.astype(np.float32), (0, 1)),
            (grey * 2 - 1, (-1, 1)),
            ((grey * 4095).round().astype(">u2"), (0, 4095)),
        ):
            self.write(path, **self.arrays(values))
            assert "set data.pixel_range" in refusal("npz", path)
            images, _ = read_all(open_named("npz", path, pixel_range=limits), "test", 6)
            assert np.abs(images[..., 0].astype(int) - shown).max() <= 1
        grey[2, 3, 3] = np.nan
        source = open_named("npz", self.write(path, **self.arrays(grey)), pixel_range=(0, 1))
        with pytest.raises(Exception, match=r"it\.npz: an image of train_images .*NaN"):
            read_all(source, "train", 6)

    def test_channels_first_or_last(self, tmp_path):
        rng = np.random.default_rng(5)
        colours = rng.integers(0, 256, (4, 6, 7, 3), np.uint8)[:, :, :6]
        path = tmp_path / "it.npz"
        for images in (colours, colours.transpose(0, 3, 1, 2)):
            self.write(path, **self.arrays(np.ascontiguousarray(images)))
            assert np.array_equal(read_all(open_named("npz", path), "train", 6)[0], colours)
        self.write(path, **self.arrays(colours[..., :1].copy()))
        assert open_named("npz", path).n_train == 4

    def test_a_folder_words_and_validation_as_test(self, tmp_path):
        made = octmnist_arrays()
        words = np.array(["an owl", "a cat"])
        for split in ("train", "val"):
            labels = words[made[f"{split}_labels"][:, 0] % 2]
            self.write(tmp_path / f"{split}.npz", images=made[f"{split}_images"], labels=labels)
        source = open_named("npz", tmp_path)
        assert source.class_names == ("a cat", "an owl") and source.n_test == 5
        source.verify()

    def test_ids_split_records_and_nothing_else_does(self, tmp_path):
        made = octmnist_arrays()
        path = tmp_path / "it.npz"
        parts = {"images": made["train_images"], "labels": made["train_labels"]}
        assert "add test_images" in refusal("npz", self.write(path, **parts))
        names = np.array([f"scan {i}" for i in range(40)])
        source = open_named("npz", self.write(path, **parts, ids=names), test_fraction=0.3)
        wanted = [i for i in range(40) if split_of(f"scan {i}", 0.3) == "test"]
        assert source.records("test")[1].tolist() == wanted
        images, _ = read_all(source, "test", 28)
        assert np.array_equal(images[..., 0], made["train_images"][wanted])
        self.write(path, **parts, ids=np.zeros(40, int))
        assert "must name each of 40 images differently" in refusal("npz", path)

    def test_what_is_refused(self, tmp_path):
        grey = np.zeros((4, 6, 6), np.uint8)
        good = self.arrays(grey)
        path = tmp_path / "it.npz"
        one_hot = np.eye(4, dtype=np.uint8)
        for change, words in (
            ({"train_images": np.asfortranarray(np.zeros((4, 6, 6), np.uint8))}, "Fortran order"),
            ({"train_images": grey[0]}, "shape (N, H, W)"),
            ({"train_images": np.zeros((4, 6, 6, 5), np.uint8)}, "(4, 6, 6, 5)"),
            ({"train_images": grey.astype(complex)}, "must be numbers"),
            ({"train_labels": np.arange(3)}, "4 train_images and 3 train_labels"),
            ({"train_labels": one_hot}, "must be of shape (N,) or (N, 1)"),
            ({"train_labels": np.array([0, -1, 1, 0])}, "found -1"),
            ({"train_labels": np.array(list("abab"))}, "words in one split only"),
            ({"class_names": np.array(["only"])}, "[0, 1)"),
            ({"class_names": np.array(["a", "a"])}, "two classes are called a"),
            ({"train_labels": np.array([0, 10**12, 1, 0])}, "number the classes from 0"),
        ):
            message = refusal("npz", self.write(path, **{**good, **change}))
            assert words in message and "it.npz" in message, message
        np.save(tmp_path / "one.npy", grey)
        assert "not a readable .npz file" in refusal("npz", tmp_path / "one.npy")

    def test_nothing_is_unpickled(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (tmp_path / "ran").touch, ()

        evil = np.array([Malicious()] * 4, object)
        path = tmp_path / "it.npz"
        for name in ("train_labels", "train_images", "class_names"):
            arrays = {**self.arrays(np.zeros((4, 6, 6), np.uint8)), name: evil}
            assert name in refusal("npz", self.write(path, **arrays))
            assert not (tmp_path / "ran").exists()
        sink = io.BytesIO()
        np.save(sink, evil)
        sink.seek(0)
        np.load(sink, allow_pickle=True)  # it would have
        assert (tmp_path / "ran").exists()
