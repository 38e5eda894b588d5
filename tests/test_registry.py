"""Tables: open to rows from outside, listed without loading what the rows need."""

from __future__ import annotations

import sys

import pytest

from sapf_ray import registry
from sapf_ray.errors import ConfigError, SapfError
from sapf_ray.registry import Registry, load_plugins, names


@pytest.fixture
def table() -> Registry[object]:
    return Registry("saliency.score", {"row": 1, "lazy": "math:pi"})


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a module of the given text and makes it importable; forgets it afterwards."""
    monkeypatch.setenv(registry.PLUGINS, "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_loaded", set())

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_table_reads_like_a_dict_in_the_order_of_entry(table):
    table["mine"] = 2
    assert list(table) == ["row", "lazy", "mine"]
    assert len(table) == 3 and "mine" in table and "other" not in table
    assert table["lazy"] == pytest.approx(3.14159, abs=1e-5)
    with pytest.raises(ConfigError, match=r"saliency\.score = 'x': must be one of row, lazy, mine"):
        table["x"]
    assert table.get("x") is None and table.get("row") == 1


def test_a_row_is_not_replaced_by_accident(table):
    with pytest.raises(ValueError, match="'row' is there already"):
        table["row"] = 2
    del table["row"]
    table["row"] = 2
    assert table["row"] == 2


def test_a_folder_is_listed_without_importing_its_files():
    sources = Registry("data.source", folder="sapf_ray.data.sources")
    assert {"digits", "parquet", "stand_in"} <= set(sources)
    assert not any(name.startswith("_") for name in sources)


def test_a_plugin_adds_a_row_that_the_config_key_then_takes(plugin):
    name = plugin(
        "adds_a_source",
        "from sapf_ray.data.base import ImageSource, register\n"
        "@register('from_outside')\n"
        "class Outside(ImageSource): pass\n",
    )
    assert "from_outside" not in names("data.source")
    load_plugins([name])
    try:
        assert names("data.source")[-1] == "from_outside"
        assert registry.row("data.source", "from_outside").name == "from_outside"
    finally:
        del sys.modules["sapf_ray.data.base"].SOURCES["from_outside"]


def test_worker_processes_load_the_plugins_before_the_first_look(plugin, monkeypatch, table):
    monkeypatch.setattr(registry, "the_table", table, raising=False)
    name = plugin(
        "adds_in_worker", "from sapf_ray import registry\nregistry.the_table['new'] = 3\n"
    )
    monkeypatch.setenv(registry.PLUGINS, name)  # as a worker inherits it
    assert table["new"] == 3


@pytest.mark.parametrize("text", ["import no_such_module_at_all", "1 / 0", "raise SystemError"])
def test_a_plugin_that_cannot_be_imported_is_one_line(plugin, text):
    name = plugin("broken_plugin", text)
    with pytest.raises(
        SapfError, match=r"^plugins = 'broken_plugin': cannot be imported: "
    ) as raised:
        load_plugins([name])
    assert "\n" not in str(raised.value)
    with pytest.raises(SapfError, match="no_such_plugin"):
        load_plugins(["no_such_plugin"])
