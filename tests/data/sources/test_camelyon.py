"""Camelyon17-WILDS: the official split, reproduced."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sapf_ray.config.groups import grouping_of
from sapf_ray.data import files, image_files
from sapf_ray.data.sources import camelyon
from tests.data.sources.published import (
    PATCHES,
    TEST_PATCHES,
    TRAIN_PATCHES,
    open_named,
    patch_path,
    read_all,
    refusal,
    write_camelyon,
)


@pytest.fixture
def root(tmp_path):
    write_camelyon(tmp_path / "camelyon17_v1.0")
    return tmp_path / "camelyon17_v1.0"


def test_official_split_from_the_folder_or_the_one_above(root):
    for path in (root, root.parent):
        source = open_named("camelyon", path)
        assert (source.n_train, source.n_test) == (len(TRAIN_PATCHES), len(TEST_PATCHES))
        for split, rows in (("train", TRAIN_PATCHES), ("test", TEST_PATCHES)):
            images, labels = read_all(source, split, 96)
            assert images[:, 0, 0].tolist() == [[20 * i, 5, 7] for i in rows]
            assert labels.tolist() == [PATCHES[i][4] for i in rows] == source.labels(split).tolist()
        source.verify()
    assert source.prompts == ("A normal lymph node image", "A lymph node histopathology image")


def test_opening_opens_no_image_and_pickles_small(root, monkeypatch):
    monkeypatch.setattr(image_files, "decode", lambda *a: pytest.fail("an image was decoded"))
    source = open_named("camelyon", root)
    packed = pickle.dumps(source)
    assert len(packed) < 2000 and b"patient_004" not in packed
    monkeypatch.undo()
    assert np.array_equal(
        read_all(pickle.loads(packed), "train", 8)[0], read_all(source, "train", 8)[0]
    )


def test_each_directory_is_listed_once_per_split(root, monkeypatch):
    """Rows of one slide are scattered over the published table."""
    source = open_named("camelyon", root)
    listed = []
    original = image_files._list
    monkeypatch.setattr(
        image_files, "_list", lambda folder: listed.append(folder.name) or original(folder)
    )
    source.verify()
    folders = [patch_path(PATCHES[i]).split("/")[1] for i in (*TRAIN_PATCHES, *TEST_PATCHES)]
    assert sorted(listed) == sorted(set(folders)) and len(folders) > len(listed)


def test_verify_opens_a_bounded_sample(root, monkeypatch):
    opened = []
    monkeypatch.setattr(image_files, "decode", lambda path, resolution: opened.append(path.name))
    monkeypatch.setattr(files.evenly_spread, "__defaults__", (2,))
    open_named("camelyon", root).verify()
    first_and_last = [rows[i] for rows in (TRAIN_PATCHES, TEST_PATCHES) for i in (0, -1)]
    assert sorted(opened) == sorted(
        patch_path(PATCHES[i]).rsplit("/", 1)[1] for i in first_and_last
    )
    assert len(files.evenly_spread(300_000, 1024)) == 1024


def test_published_sizes(root, monkeypatch):
    monkeypatch.setattr(camelyon, "N_PUBLISHED", len(PATCHES))
    assert "published are 302436 and 85054" in refusal("camelyon", root)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tumor", "tumour", "tumor"),
        (",patient", ",patients", "patient"),
        ("3328", "x", "not the published table"),
        (",4,3328,", ",,3328,", "empty cells"),
        ("21792,1,", "21792,2,", "column tumor"),
        ("21792,1,0,0,0", "21792,1,0", "not the published table"),
    ],
)
def test_a_damaged_table(root, old, new, words):
    path = root / "metadata.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    message = refusal("camelyon", root)
    assert "metadata.csv" in message and words in message and "wilds.stanford.edu" in message


def test_a_hospital_that_is_missing(root):
    path = root / "metadata.csv"
    path.write_text(
        "\n".join(
            line
            for line in path.read_text().splitlines()
            if not line.split(",")[1:2] or line[-3] != "2"
        )
    )
    assert "no test image (rows of center 2)" in refusal("camelyon", root)


def test_missing_files(root):
    image = root / patch_path(PATCHES[TEST_PATCHES[-1]])
    image.write_bytes(image.read_bytes()[:60])
    assert f"{image}: cannot be read as an image" in refusal("camelyon", root)
    image.unlink()
    assert f"{image}: no such file" in refusal("camelyon", root)
    (root / "patches").rename(root / "patch")
    assert "no patches" in refusal("camelyon", root)
    (root / "metadata.csv").unlink()
    assert "no metadata.csv" in refusal("camelyon", root)


def test_patients_and_slides_are_groups(root):
    source = open_named("camelyon", root)
    patients = [PATCHES[i][0] for i in TRAIN_PATCHES]
    slides = [f"patient_{PATCHES[i][0]}_node_{PATCHES[i][1]}" for i in TRAIN_PATCHES]
    assert list(source.group_names(grouping_of("published"))) == patients
    assert list(source.group_names(grouping_of("folder:1"))) == slides
