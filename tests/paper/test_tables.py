"""The paper's tables as shipped.

All parse, with the declared columns and the printed number of rows.
"""

from __future__ import annotations

import csv
import math
from importlib import resources

import pytest

from sapf_ray.errors import ConfigError, DataError
from sapf_ray.paper import tables as paper
from sapf_ray.paper.tables import DATASETS, PAPER_TABLES, paper_setting, paper_table

ROWS = {
    "table2": 4,
    "table3": 4,
    "table5": 4 * 6 * 4 * 2,
    "table6": 6,
    "table7": 8 * 16,
    "table8": 16,
    "table9": 8,
    "table10": 12,
    "table11": 32,
    "table12": 18,
    "table13": 10,
    "table14": 18,
    "table15": 8,
}


def test_every_shipped_file_is_a_declared_table():
    shipped = {
        f.name
        for f in (resources.files("sapf_ray.paper") / "published").iterdir()
        if f.name.endswith(".csv")
    }
    assert shipped == {table.file for table in PAPER_TABLES.values()}
    assert set(ROWS) == set(PAPER_TABLES)


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_tables_parse(name):
    rows = paper_table(name)
    table = PAPER_TABLES[name]
    assert len(rows) == ROWS[name]
    for row in rows:
        assert set(row) == table.columns
        assert all(row[key] is None or type(row[key]) is float for key in table.numbers)
        assert all(row[key] is None or (type(row[key]) is str and row[key]) for key in table.text)
    missing = {key for row in rows for key, value in row.items() if value is None}
    assert missing == {"table7": {"attn1", "attn2"}, "table13": {"epsilon"}}.get(name, set())


def test_known_cells():
    assert paper_table("table10")[0] == {
        "dataset": "celeba",
        "epsilon": 1.0,
        "sigma_s": 5.0,
        "selection_percent": 12.92,
        "finetune_percent": 87.08,
    }
    assert {row["epsilon"] for row in paper_table("table8")} == {10.0, math.inf}
    assert all(
        row["selection_percent"] + row["finetune_percent"] == pytest.approx(100)
        for row in paper_table("table10")
    )


def test_rows_are_the_callers_own():
    paper_table("table9")[0]["fid"] = -1.0
    assert paper_table("table9")[0]["fid"] == 25.0


def test_settings():
    setting = paper_setting("celeba")
    assert (setting.n_train, setting.batch_size, setting.steps, setting.sigma_s) == (
        162_770,
        4096,
        1000,
        5.0,
    )
    assert setting.delta == pytest.approx(1 / (162_770 * math.log(162_770)))
    assert dict(setting.noise_multipliers) == {1.0: 4.2, 10.0: 0.8}
    assert [paper_setting(name).n_train for name in DATASETS] == [45_000, 97_477, 162_770, 302_436]


def test_unknown_names_say_what_is_allowed():
    with pytest.raises(ConfigError, match="table = 'table99': must be one of table2, "):
        paper_table("table99")
    with pytest.raises(ConfigError, match="dataset = 'mnist': must be one of cifar10, "):
        paper_setting("mnist")


@pytest.mark.parametrize(
    "text,message",
    [
        ("epsilon,fid\n1,2\n", "has the columns"),
        ("epsilon,sigma_s,fid,acc\n1,5,many,3\n", "line 2"),
        ("epsilon,sigma_s,fid,acc\n1,5\n", "line 2"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, monkeypatch, text, message):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "table09_sigma_s.csv").write_text(text)
    monkeypatch.setattr(paper.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=rf"table09_sigma_s\.csv.*{message}"):
        paper._rows.__wrapped__("table9")


def test_files_end_with_complete_lines():
    for table in PAPER_TABLES.values():
        text = (resources.files("sapf_ray.paper") / "published" / table.file).read_text()
        widths = {len(row) for row in csv.reader(text.splitlines())}
        assert len(widths) == 1, table.file
