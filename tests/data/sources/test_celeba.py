"""CelebA in the layouts in which it is handed round."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from sapf_ray.config.groups import grouping_of
from sapf_ray.data import image_files, record_source
from sapf_ray.data.sources import celeba
from sapf_ray.errors import ConfigError, DataError
from tests.data.sources.published import (
    MALE,
    PARTITION,
    open_named,
    read_all,
    refusal,
    write_celeba,
)

TRAIN = [i for i, part in enumerate(PARTITION) if part == 0]
TEST = [i for i, part in enumerate(PARTITION) if part == 2]


@pytest.fixture
def root(tmp_path):
    write_celeba(tmp_path)
    return tmp_path


@pytest.fixture
def refuse_images(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(image_files, "decode", refuse)


def check(source):
    assert (source.n_train, source.n_test) == (len(TRAIN), len(TEST))
    for split, rows in (("train", TRAIN), ("test", TEST)):
        images, labels = read_all(source, split, 16)
        assert labels.tolist() == [int(MALE[i] == 1) for i in rows] and np.array_equal(
            labels, source.labels(split)
        )
        for image, i in zip(images.astype(int), rows, strict=True):  # the dropped rows are white
            assert np.abs(image[2:-2] - 10 * i).max() <= 3
            assert np.abs(image - 10 * i).max() <= 40  # JPEG blocks at the cut
    source.verify()


def test_text_lists(root, tmp_path):
    check(open_named("celeba", root))


def test_sub_folder_and_the_publisher_s_folders(tmp_path):
    write_celeba(tmp_path / "celeba")
    check(open_named("celeba", tmp_path))
    for folder, name in (
        ("Anno", "list_attr_celeba.txt"),
        ("Eval", "list_eval_partition.txt"),
        ("Img", "img_align_celeba"),
    ):
        (tmp_path / "celeba" / folder).mkdir()
        (tmp_path / "celeba" / name).rename(tmp_path / "celeba" / folder / name)
    check(open_named("celeba", tmp_path))


def test_kaggle_copy(tmp_path):
    write_celeba(tmp_path, kaggle=True)
    check(open_named("celeba", tmp_path))


def test_opening_opens_no_image(root, refuse_images):
    source = open_named("celeba", root)
    assert source.labels("train").sum() == sum(MALE[i] == 1 for i in TRAIN) and source.fingerprint()
    assert source.prompts == ("An image of a female face", "An image of a male face")
    packed = pickle.dumps(source)
    assert len(packed) < 2500 and b"000001.jpg" not in packed
    assert np.array_equal(pickle.loads(packed).labels("train"), source.labels("train"))


def test_the_index_is_made_once_per_process(root, monkeypatch):
    source = open_named("celeba", root)
    monkeypatch.setattr(celeba, "_table", lambda *a: pytest.fail("the lists were read again"))
    source.read("train", np.array([0]), resolution=8)
    pickle.loads(pickle.dumps(source)).read("test", np.array([0]), resolution=8)


def test_order_of_indices_and_bounds(root):
    source = open_named("celeba", root)
    images, labels = source.read("train", np.array([4, 0]), resolution=8)
    assert np.array_equal(images[::-1], source.read("train", np.array([0, 4]), resolution=8)[0])
    assert labels.tolist() == source.labels("train")[[4, 0]].tolist()
    with pytest.raises(IndexError):
        source.read("test", np.array([3]), resolution=8)


def test_fingerprint(root):
    first = open_named("celeba", root).fingerprint()
    assert open_named("celeba", root).fingerprint() == first
    os.utime(root / "img_align_celeba" / "000002.jpg", ns=(1, 1))
    assert open_named("celeba", root).fingerprint() != first


def test_published_sizes_are_asked_of_the_whole_set_only(root, monkeypatch):
    open_named("celeba", root).verify()
    monkeypatch.setattr(celeba, "N_PUBLISHED", len(PARTITION))
    message = refusal("celeba", root)
    assert "7 training and 3 test images" in message and "162770 and 19962" in message


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


ATTR = "list_attr_celeba.txt"
EVAL = "list_eval_partition.txt"


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (ATTR, "12\n", "13\n", "announces 13 rows, has 12"),
        (ATTR, "12\n", "", "first line must be the number of rows"),
        (ATTR, "Male", "Female", "no column Male"),
        (ATTR, "000003.jpg", "000002.jpg", ""),
        (ATTR, "000003.jpg -1", "000003.jpg -1\n", "line 5"),
        (EVAL, "000012.jpg 0\n", "", "(11)"),
        (EVAL, "000012.jpg 0", "000012.jpg 5", "must be among 0, 1, 2"),
        (EVAL, " 2\n", " 1\n", "partition 2 (test)"),
    ],
)
def test_damaged_lists(root, *, name, old, new, words):
    edit(root / name, old, new)
    message = refusal("celeba", root)
    assert name in message and words in message and "mmlab" in message, message


@pytest.mark.parametrize("name", ["list_attr_celeba", "list_eval_partition", "img_align_celeba"])
def test_a_missing_part_is_named(root, name):
    path = root / ("img_align_celeba" if name.startswith("img") else f"{name}.txt")
    path.rename(root / "elsewhere")
    message = refusal("celeba", root)
    assert name in message and "mmlab" in message


def test_images_that_are_missing_empty_or_cut_off(root, monkeypatch):
    path = root / "img_align_celeba" / "000012.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    assert f"{path}: cannot be read as an image" in refusal("celeba", root)
    with pytest.raises(DataError, match=r"000012\.jpg"):
        read_all(open_named("celeba", root), "train", 8)
    monkeypatch.setattr(
        record_source, "evenly_spread", lambda n: np.array([0])
    )  # as if 000012 were outside the sample
    open_named("celeba", root).verify()
    path.write_bytes(b"")
    assert f"{path}: empty file" in refusal("celeba", root)
    path.unlink()
    message = refusal("celeba", root)
    assert f"{path}: no such file" in message and ATTR in message


def test_lists_that_change_under_an_open_source(root):
    source = open_named("celeba", root)
    edit(root / EVAL, "000012.jpg 0", "000012.jpg 1")
    with pytest.raises(DataError, match="changed since"):
        source.read("train", np.array([0]), resolution=8)


def test_published_identities_are_groups(root):
    source = open_named("celeba", root)
    with pytest.raises(DataError, match="identity_CelebA"):
        source.group_names(grouping_of("published"))
    lines = [f"{i + 1:06d}.jpg {2000 + i // 2}" for i in range(len(PARTITION))]
    (root / "identity_CelebA.txt").write_text("\n".join(lines[::-1]))
    assert source.group_names(grouping_of("published")) == [f"{2000 + i // 2}" for i in TRAIN]
    (root / "identity_CelebA.txt").write_text("\n".join(lines[2:]))
    with pytest.raises(DataError, match="lacks training images"):
        source.group_names(grouping_of("published"))
    with pytest.raises(ConfigError, match=r"column is not for data\.source = celeba"):
        source.group_names(grouping_of("column:identity"))
