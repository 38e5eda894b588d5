from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.data.packing import Names
from sapf_ray.errors import ConfigError, DataError, SapfError


def picture(size=(20, 14), value=200):
    """RGB: dark left half, light right half."""
    pixels = np.full((size[1], size[0], 3), 10, np.uint8)
    pixels[:, size[0] // 2 :] = value
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 60 images, sizes and formats mixed."""
    root = tmp_path / "photos"
    for name in ("brown_bear", "owl"):
        (root / name).mkdir(parents=True)
        for i in range(30):
            suffix = (".png", ".jpg", ".JPEG", ".bmp", ".webp")[i % 5]
            picture((16 + i, 40 - i)).save(root / name / f"{i:03d}{suffix}")
    (root / "owl" / "notes.txt").write_text("not an image")
    (root / "owl" / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    return root


def folder_config(path, **kwargs):
    return DataConfig(source="image_folder", path=str(path), **kwargs)


def read_all(source, split, resolution=8):
    return source.read(
        split,
        np.arange(source.n_train if split == "train" else source.n_test),
        resolution=resolution,
    )


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("sapf_ray.data.sources.digits._load", refuse)


class TestDigits:
    source = open_source(DataConfig())

    def test_split_is_1297_and_500_and_disjoint(self):
        train = self.source._records("train")
        test = self.source._records("test")
        assert (len(train), len(test)) == (self.source.n_train, self.source.n_test) == (1297, 500)
        assert sorted([*train, *test]) == list(range(1797))
        assert train[:5].tolist() == [1223, 327, 1791, 48, 1302]  # constant over versions

    def test_images_are_light_ink_on_dark_in_the_full_range(self):
        images, labels = self.source.read("train", np.arange(100), resolution=32)
        assert (
            images.shape == (100, 32, 32, 3)
            and images.dtype == np.uint8
            and labels.dtype == np.int64
        )
        assert images.max() == 255 and images.min() == 0 and images.mean() < 110
        assert (images[..., 0] == images[..., 2]).all()
        assert images[:, :4, :4].mean() < 20  # corners are ground

    def test_reads_in_the_order_asked(self):
        images, labels = self.source.read("test", np.array([7, 3]), resolution=8)
        again, again_labels = self.source.read("test", np.array([3, 7]), resolution=8)
        assert np.array_equal(images, again[::-1]) and np.array_equal(labels, again_labels[::-1])
        assert labels.tolist() == self.source.labels("test")[[7, 3]].tolist()
        assert self.source.read("test", np.array([], int), resolution=8)[0].shape == (0, 8, 8, 3)

    def test_opening_reads_nothing(self, no_decoding):
        assert open_source(DataConfig()).prompts[0] == "An image of the digit zero"

    @pytest.mark.parametrize("index", [-1, 500])
    def test_an_index_outside_the_split_is_refused(self, index):
        with pytest.raises(IndexError):
            self.source.read("test", np.array([index]), resolution=8)

    def test_fingerprint_is_stable_and_pickle_small(self):
        assert self.source.fingerprint() == open_source(DataConfig()).fingerprint()
        assert len(pickle.dumps(self.source)) < 2000


class TestImageFolder:
    def test_reads_any_size_and_format_as_square_rgb(self, folder):
        source = open_source(folder_config(folder))
        assert source.class_names == ("brown_bear", "owl")
        assert source.prompts == ("An image of brown bear", "An image of owl")
        assert source.n_train + source.n_test == 60 and source.n_test >= 4
        for split in ("train", "test"):
            images, labels = read_all(source, split, 12)
            assert images.shape[1:] == (12, 12, 3) and images.dtype == np.uint8
            assert np.array_equal(labels, source.labels(split)) and set(labels.tolist()) == {0, 1}
            assert images[:, :, :4].mean() < 30 and images[:, :, -4:].mean() > 170

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
    def test_modes(self, tmp_path, mode):
        for part in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / part).mkdir(parents=True)
            picture().save(tmp_path / part / "y.png")
        path = tmp_path / "train" / "a" / ("x.jpg" if mode == "CMYK" else "x.png")
        if mode == "I;16":
            Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257).save(path)
        else:
            picture().convert(mode).save(path)
        assert Image.open(path).mode == mode
        deep = {"pixel_range": (0, 65535)} if mode == "I;16" else {}
        source = open_source(folder_config(tmp_path, **deep))
        source.verify()
        image = source.read("train", np.array([0]), resolution=10)[0][0]
        assert image.shape == (10, 10, 3)
        assert image[:, :3].mean() < 40 and image[:, -3:].mean() > 170

    def test_transparency_is_shown_over_white(self, folder):
        clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
        for split in ("train", "test"):
            for name in ("a", "b"):
                (folder / split / name).mkdir(parents=True)
                clear.save(folder / split / name / "x.png")
        assert read_all(open_source(folder_config(folder)), "train")[0].min() == 255

    def test_centre_is_kept_when_cropping(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for i in range(20):
                pixels = np.zeros((10, 30, 3), np.uint8)
                pixels[:, 10:20] = 255
                Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        assert read_all(open_source(folder_config(tmp_path)), "test", 10)[0].min() == 255

    def test_opening_decodes_no_image(self, folder, no_decoding):
        source = open_source(folder_config(folder))
        assert len(source.labels("train")) == source.n_train and source.fingerprint()

    def test_adding_an_image_moves_no_other_between_the_splits(self, folder):
        def members():
            source = open_source(folder_config(folder))
            return {split: set(source._paths[split]) for split in ("train", "test")}

        before = members()
        picture().save(folder / "owl" / "000a.png")
        after = members()
        assert before["train"] <= after["train"] and before["test"] <= after["test"]
        assert len(after["train"] | after["test"]) == 61 and not after["train"] & after["test"]

    def test_given_split_is_used(self, tmp_path):
        for split, count in (("train", 3), ("test", 2)):
            for name in ("a", "b"):
                (tmp_path / split / name).mkdir(parents=True)
                for i in range(count):
                    picture().save(tmp_path / split / name / f"{i}.png")
        source = open_source(folder_config(tmp_path))
        assert (source.class_names, source.n_train, source.n_test) == (("a", "b"), 6, 4)
        (tmp_path / "train" / "c").mkdir()
        with pytest.raises(DataError, match="only one has c"):
            open_source(folder_config(tmp_path))

    def test_classes_may_be_called_train_and_test(self, tmp_path):
        for name in ("train", "test"):
            (tmp_path / name).mkdir()
            for i in range(20):
                picture().save(tmp_path / name / f"{i}.png")
        assert open_source(folder_config(tmp_path)).class_names == ("test", "train")

    def test_fingerprint_follows_the_files(self, folder):
        first = open_source(folder_config(folder)).fingerprint()
        assert open_source(folder_config(folder)).fingerprint() == first
        picture((30, 30), value=90).save(folder / "owl" / "000.png")
        assert open_source(folder_config(folder)).fingerprint() != first

    def test_a_pickled_source_reads_the_same_and_is_small(self, folder):
        source = open_source(folder_config(folder))
        copy = pickle.loads(pickle.dumps(source))
        for ours, theirs in zip(read_all(source, "test"), read_all(copy, "test"), strict=True):
            assert np.array_equal(ours, theirs)
        source._paths["train"] = Names(f"class/{i:06d}.jpg" for i in range(160_000))
        source._labels["train"] = np.zeros(160_000, np.int32)
        assert len(pickle.dumps(source)) < 1.5e6

    def test_prompt_template(self, folder):
        source = open_source(folder_config(folder, prompt_template="{name}, {artistic}"))
        assert source.prompts[0] == "brown bear, {artistic}"


class TestBadInput:
    def refused(self, config, *parts):
        with pytest.raises(SapfError) as caught:
            source = open_source(config)
            source.verify()
        message = str(caught.value)
        assert "\n" not in message and all(str(part) in message for part in parts), message
        return caught.value

    def test_unknown_source(self):
        with pytest.raises(ConfigError, match=r"data\.source = 'imagenet'.*digits, eurosat"):
            DataConfig(source="imagenet")

    def test_path_not_given_missing_or_a_file(self, tmp_path):
        assert isinstance(self.refused(DataConfig(source="image_folder"), "data.path"), ConfigError)
        self.refused(folder_config(tmp_path / "nowhere"), tmp_path / "nowhere", "no such directory")
        (tmp_path / "file").write_text("")
        self.refused(folder_config(tmp_path / "file"), tmp_path / "file", "not a directory")

    def test_layout(self, folder):
        self.refused(folder_config(folder / "owl"), folder / "owl", "no class sub-folders")
        (folder / "empty").mkdir()
        self.refused(folder_config(folder), folder / "empty", "class without images")
        shutil.rmtree(folder / "empty")
        shutil.rmtree(folder / "owl")
        self.refused(folder_config(folder), folder, "only one class (brown_bear)")

    def test_a_split_without_images(self, folder):
        self.refused(
            folder_config(folder, test_fraction=1e-9), folder, "test split", "data.test_fraction"
        )

    @pytest.mark.parametrize("name", ["000.png", "001.jpg", "003.bmp", "004.webp"])
    @pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
    def test_unreadable_image_is_found_before_and_at_reading(self, folder, name, damage):
        path = folder / "owl" / name
        content = path.read_bytes()
        path.write_bytes(
            {"truncated": content[: len(content) * 2 // 3], "text": b"not an image", "empty": b""}[
                damage
            ]
        )
        self.refused(folder_config(folder), path, "cannot be read as an image")
        source = open_source(folder_config(folder))
        with pytest.raises(DataError, match=name) as caught:
            read_all(source, "train")
            read_all(source, "test")
        assert "\n" not in str(caught.value)

    def test_several_are_counted(self, folder):
        for name in ("000.png", "001.jpg"):
            (folder / "owl" / name).write_bytes(b"")
        self.refused(folder_config(folder), folder / "owl" / "000.png", "(and 1 more)")

    def test_an_image_that_goes_away_is_named(self, folder):
        source = open_source(folder_config(folder))
        shutil.rmtree(folder / "owl")
        with pytest.raises(DataError, match="owl"):
            read_all(source, "train")
