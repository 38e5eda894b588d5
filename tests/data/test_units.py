"""Groups of images: found in every way a source offers, bad ones refused in one line; their draws
and their parts of one vote.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sapf_ray.config import DataConfig
from sapf_ray.data.base import open_source
from sapf_ray.data.units import Units
from sapf_ray.errors import ConfigError, SapfError
from sapf_ray.privacy.keyed_rng import NoiseKey

KEY = NoiseKey.create(7)
N_WRITERS, EACH = 12, 3


def writers_folder(root, *, nested: bool = False):
    """Images ``w03_1.png`` of 12 writers, 3 each, in two classes; a list with a column of them."""
    rows = ["file_name,label,split,Writer"]
    for split in ("train", "test"):
        for writer in range(N_WRITERS):
            for number in range(EACH):
                label = "ab"[number % 2]
                folder = root / split / label / (f"w{writer:02d}" if nested else "")
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"w{writer:02d}_{number}.png"
                Image.new("L", (8, 8), 20 * writer).save(path)
                rows.append(f"{path.relative_to(root).as_posix()},{label},{split},w{writer:02d}")
    return rows


def units_of(root, groups: str) -> Units:
    units = open_source(DataConfig(source="image_folder", path=str(root), groups=groups)).units
    assert units is not None
    return units


def test_a_folder_a_pattern_and_a_column_find_the_same_writers(tmp_path):
    rows = writers_folder(tmp_path, nested=True)
    by_folder = units_of(tmp_path, "folder:1")
    by_pattern = units_of(tmp_path, "pattern:^(w[0-9]+)_")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    by_column = units_of(tmp_path, "column:writer")
    assert len(by_folder) == N_WRITERS and np.diff(by_folder.starts).tolist() == [EACH] * N_WRITERS
    assert by_folder.digest() == by_pattern.digest()
    # a list has another order of the images
    assert len(by_column) == N_WRITERS and set(np.diff(by_column.starts)) == {EACH}
    source = open_source(DataConfig(source="image_folder", path=str(tmp_path)))
    assert source.units is None and source.n_units == source.n_train == N_WRITERS * EACH


def test_groups_of_a_parquet_column(tmp_path):
    content = [{"bytes": b"x", "path": f"{i}.png"} for i in range(36)]
    writers = [i % N_WRITERS for i in range(36)]
    for split in ("train", "test"):
        table = pa.table({"image": content, "label": [i % 2 for i in range(36)], "writer": writers})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    config = {"source": "parquet", "path": str(tmp_path)}
    units = open_source(DataConfig(**config, groups="column:writer")).units
    assert units is not None and len(units) == N_WRITERS
    for unit in range(N_WRITERS):
        assert len({writers[image] for image in units.members(unit)}) == 1
    with pytest.raises(ConfigError, match=r"column of train\.parquet; it has image, label, writer"):
        open_source(DataConfig(**config, groups="column:patient"))
    pq.write_table(
        pa.table({"image": content, "label": [0, 1] * 18, "writer": [None, *writers[1:]]}),
        tmp_path / "train.parquet",
    )
    with pytest.raises(SapfError, match="empty cells"):
        open_source(DataConfig(**config, groups="column:writer"))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("patient", "must be column:NAME"),
        ("folder:0", "must be column:NAME"),
        ("pattern:w[0-9]+", "exactly one group"),
        ("pattern:(w", "regular expression"),
        ("pattern:^(x[0-9]+)_", "finds no group in it"),
        ("folder:4", "lies in 2 folders"),
        ("folder:1", "at least 10 groups"),
        ("pattern:_(.)", "at least 10 groups"),
        ("pattern:^(w0)|^(?:w1)", "finds no group in it"),
        ("column:writer", "needs a list of the images"),
        ("published", "published is not for data.source = image_folder"),
    ],
)
def test_groups_that_do_not_fit_are_refused_in_one_line(groups, words, tmp_path):
    writers_folder(tmp_path)
    with pytest.raises(SapfError) as caught:
        units_of(tmp_path, groups)
    message = str(caught.value)
    assert words in message and "data.groups" in message and len(message.splitlines()) == 1


def test_an_empty_cell_and_a_group_of_more_than_half_are_refused(tmp_path):
    rows = writers_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("\n".join([rows[0], rows[1][:-3], *rows[2:]]))
    with pytest.raises(SapfError, match=r"line 2: no writer; data\.groups needs one in every row"):
        units_of(tmp_path, "column:writer")
    with pytest.raises(ConfigError, match=r"column of metadata\.csv; it has file_name, label"):
        units_of(tmp_path, "column:patient")
    names = [f"w{i}" for i in range(10)] + ["w0"] * 10
    from sapf_ray.data.units import checked_units

    assert len(checked_units(names[:-2], "column:x")) == 10
    with pytest.raises(ConfigError, match="no group of more than half"):
        checked_units(names, "column:x")


def test_sources_that_know_no_groups_refuse_them(tmp_path):
    with pytest.raises(ConfigError, match="do not say whose an image is"):
        open_source(DataConfig(source="digits", groups="published"))
    with pytest.raises(ConfigError, match=r"data\.max_images_per_group"):
        DataConfig(max_images_per_group=3)


def uneven() -> Units:
    """Groups of 1, 2, … 6 images, their images mixed."""
    names = np.random.default_rng(0).permutation(np.repeat([*"abcdef"], [1, 2, 3, 4, 5, 6]))
    return Units.of(names.tolist())


def test_draws_are_of_the_groups_own_images_all_of_them_as_often():
    units = uneven()
    wanted = np.array([5, 0, 3])
    drawn = units.draw(KEY, "finetune/loss", 4, wanted, k=4)
    assert drawn.shape == (3, 4)
    for row, unit in zip(drawn, wanted, strict=True):
        counts = np.unique(row, return_counts=True)[1]
        assert set(row) <= set(units.members(unit)) and counts.max() - counts.min() <= 1
        assert len(counts) == min(4, len(units.members(unit)))
    alone = units.draw(KEY, "finetune/loss", 4, wanted[2:], k=4)
    assert (alone == drawn[2:]).all()  # whoever shares the micro-batch
    others = [units.draw(KEY, "finetune/loss", step, wanted, k=4).tolist() for step in range(5)]
    assert len({str(other) for other in others}) > 1


def test_a_groups_parts_are_at_most_one_vote_and_a_cap_keeps_some():
    units = uneven()
    parts = units.parts(2**20)
    for unit in range(len(units)):
        total = parts[units.members(unit)].sum()
        assert 2**20 - len(units.members(unit)) < total <= 2**20
    capped = units.capped(2, KEY)
    assert np.diff(capped.starts).tolist() == [1, 2, 2, 2, 2, 2]
    assert all(set(capped.members(i)) <= set(units.members(i)) for i in range(6))
    left_out = np.setdiff1d(units.images, capped.images)
    assert (capped.parts(2**20)[left_out] == 0).all()
    assert capped.digest() != units.capped(2, NoiseKey.create(8)).digest()


def test_what_is_saved_is_what_is_loaded_and_private(tmp_path):
    units = uneven().capped(3, KEY)
    units.save(tmp_path / "units.npy")
    assert Units.load(tmp_path / "units.npy").digest() == units.digest()
    assert (tmp_path / "units.npy").stat().st_mode & 0o077 == 0
