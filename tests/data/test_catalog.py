"""The catalog: the paper's Tables 3 and 14, and a row for every source."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sapf_ray.config import DataConfig
from sapf_ray.data import SOURCES, open_source
from sapf_ray.data.catalog import DATA_SETS, datasets_json
from sapf_ray.data.medmnist_sets import MEDMNIST
from sapf_ray.errors import ConfigError
from sapf_ray.report.tables import datasets_table

TABLE_3 = {
    "cifar10": (45000, 5000, 10000, 32, 10),
    "octmnist": (97477, 10832, 1000, 128, 4),
    "celeba": (162770, 19867, 19962, 256, 2),
    "camelyon": (302436, 34904, 85054, 96, 2),
}


def test_sizes_are_those_of_table_3():
    for name, sizes in TABLE_3.items():
        row = DATA_SETS[name]
        assert (row.n_train, row.n_val, row.n_test, row.resolution, len(row.class_names)) == sizes
        assert row.url.startswith("http") and row.licence and row.path


def test_every_source_has_a_row_and_as_many_prompts_as_classes():
    assert set(DATA_SETS) == set(SOURCES)
    assert all(len(row.prompts) == len(row.class_names) for row in DATA_SETS.values())
    digits = open_source(DataConfig())
    assert (DATA_SETS["digits"].class_names, DATA_SETS["digits"].prompts) == (
        digits.class_names,
        digits.prompts,
    )


def test_prompts_are_those_of_table_14():
    assert DATA_SETS["cifar10"].prompts[6] == "An image of a frog"
    assert (
        DATA_SETS["octmnist"].prompts[0]
        == "An optical coherence tomography (OCT) image for retinal disease 1"
    )


def test_for_machines():
    rows = {row["name"]: row for row in json.loads(json.dumps(datasets_json()))}
    assert (
        rows["celeba"]["n_train"] == 162770
        and rows["celeba"]["classes"] == 2
        and rows["parquet"]["classes"] is None
    )


@pytest.mark.parametrize("width", [80, 200])
def test_for_the_terminal(width):
    console = Console(width=width, file=io.StringIO())
    console.print(datasets_table())
    text = console.file.getvalue()
    assert all(name in text and row.url in text for name, row in DATA_SETS.items())
    assert (
        "302,436 train" in text and "85,054 test" in text and "non-commercial research only" in text
    )
    assert max(map(len, text.splitlines())) <= width


def test_the_page_of_sources_is_true():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    cells = {
        line.split("`")[1]: line.split(" | ")
        for line in page.splitlines()
        if line.startswith("| `")
    }
    assert set(cells) == set(DATA_SETS) - {"digits", "stand_in"}
    for name, (_, title, path, heeds) in cells.items():
        row = DATA_SETS[name]
        assert (title, path) == (row.title, row.path)
        keys = set(row.options) - {"prompt_template"}
        assert heeds.removesuffix(" |").split(", ") == (sorted(keys) or ["-"])


# numbers of images and classes as the MedMNIST v3 page states them
MEDMNIST_TOTALS = {
    "pathmnist": (107_180, 9),
    "dermamnist": (10_015, 7),
    "octmnist": (109_309, 4),
    "pneumoniamnist": (5_856, 2),
    "breastmnist": (780, 2),
    "bloodmnist": (17_092, 8),
    "tissuemnist": (236_386, 8),
    "organamnist": (58_830, 11),
    "organcmnist": (23_583, 11),
    "organsmnist": (25_211, 11),
}


def test_every_single_label_set_of_medmnist_has_its_published_size():
    assert set(MEDMNIST_TOTALS) == set(MEDMNIST)
    for name, (total, classes) in MEDMNIST_TOTALS.items():
        row = MEDMNIST[name]
        assert (row.n_train + row.n_val + row.n_test, len(row.class_names)) == (total, classes)
        assert len(set(row.prompts)) == classes


def test_class_lists_are_whole():
    for name, n in (("cifar100", 100), ("cifar100_coarse", 20), ("eurosat", 10), ("mnist", 10)):
        names = DATA_SETS[name].class_names
        assert len(set(names)) == n == len(set(DATA_SETS[name].prompts))
    for name in ("cifar100", "cifar100_coarse"):
        assert list(DATA_SETS[name].class_names) == sorted(DATA_SETS[name].class_names)


def test_a_published_set_under_other_words():
    words = tuple("αβγδεζηθικ")
    source = open_source(DataConfig(class_names=words, prompt_template="The letter {name}"))
    assert source.class_names == words
    assert source.prompts[3] == "The letter δ"
    assert source.fingerprint() == open_source(DataConfig()).fingerprint()
    with pytest.raises(ConfigError, match=r"data\.class_names .*10 names for digits"):
        open_source(DataConfig(class_names=words[:4]))
