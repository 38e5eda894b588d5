"""One report, four forms."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console

from sapf_ray.errors import ConfigError
from sapf_ray.report.render import FORMATS, Column, Report, latex_escape

REPORT = Report(
    name="table5",
    caption="Scores at ε = 10 & more_or_less",
    columns=(
        Column(key="dataset", header="data set", labels={"cifar10": "CIFAR-10"}),
        Column(key="method", header="method"),
        Column(key="fid", header="FID", format=".1f", paper_key="paper_fid"),
        Column(key="steps", header="steps", format=",d"),
    ),
    rows=[
        {
            "dataset": "cifar10",
            "method": "a|b [red]_x_",
            "fid": 30.04,
            "paper_fid": 26.6,
            "steps": 1000,
        },
        {"dataset": "cifar10", "method": "50% {c}", "fid": None, "paper_fid": 9.0, "steps": None},
        {"dataset": "celeba", "method": None, "fid": float("nan"), "paper_fid": None, "steps": 7},
    ],
    notes=("Ours is 100 % honest: σ² ≤ 3 & so on.",),
    group_by=("dataset",),
)


def text(report: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report)
    return console.file.getvalue()


def test_text_shows_every_cell_unbroken_and_takes_no_markup():
    shown = text(REPORT, 80)
    for cell in (
        "CIFAR-10",
        "a|b [red]_x_",
        "30.0 | 26.6",
        "- | 9.0",
        "- | -",
        "1,000",
        "50% {c}",
        "100 % honest",
    ):
        assert cell in shown, cell


def test_a_narrow_terminal_wraps_between_words_only():
    words = {
        word
        for column in REPORT.columns
        for row in REPORT.rows
        for word in column.cell(row).split()
    }
    assert words <= set(text(REPORT, 50).split())
    assert all(len(line) <= 50 for line in text(REPORT, 50).splitlines())


def test_nothing_is_cut_off_in_a_terminal_too_narrow_for_the_words():
    shown = text(
        Report(
            name="x",
            caption="t",
            columns=(Column(key="a", header="a"), Column(key="b", header="b")),
            rows=[{"a": "abcdefghij", "b": "0123456789"}],
        ),
        14,
    )
    assert set("abcdefghij0123456789") <= set(shown)


def test_markdown_has_the_same_number_of_cells_in_each_line():
    lines = [line for line in REPORT.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert lines[1] == "| :-- | :-- | --: | --: |"
    assert lines[3].endswith("| - \\| 9.0 | - |")
    assert "- Ours is 100 % honest" in REPORT.to_markdown()


def test_csv_reads_back_with_pairs_as_two_columns():
    rows = list(csv.DictReader(io.StringIO(REPORT.to_csv())))
    assert list(rows[0]) == ["dataset", "method", "fid", "paper_fid", "steps"]
    assert rows[0] == {
        "dataset": "cifar10",
        "method": "a|b [red]_x_",
        "fid": "30.04",
        "paper_fid": "26.6",
        "steps": "1000",
    }
    assert [row["fid"] for row in rows] == ["30.04", "-", "-"]
    assert rows[2]["method"] == rows[2]["paper_fid"] == "-"


def assert_balanced(latex: str) -> None:
    begun = re.findall(r"\\begin\{(\w+)\}", latex)
    assert begun[::-1] == re.findall(r"\\end\{(\w+)\}", latex)
    plain = re.sub(r"\\[{}$%&#_\\]", "", latex)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "%" not in plain


def test_latex_is_balanced_and_every_line_has_all_cells():
    latex = REPORT.to_latex()
    assert_balanced(latex)
    body = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + 3
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {3}
    assert r"\begin{tabular}{llrr}" in latex
    assert r"\label{tab:table5}" in latex
    assert body.count(r"\midrule") == 2  # below the head, and where the data set changes
    assert r"- $|$ 9.0 & - \\" in latex


def test_latex_escapes():
    assert (
        latex_escape(r"a_b & 5% \x {y} σ|ε")
        == r"a\_b \& 5\% \textbackslash{}x \{y\} $\sigma$$|$$\varepsilon$"
    )


def test_forms_by_name():
    assert REPORT.render("csv") == REPORT.to_csv()
    assert REPORT.render("markdown") == REPORT.to_markdown()
    assert REPORT.render("latex") == REPORT.to_latex()
    assert FORMATS == ("text", "markdown", "csv", "latex")
    with pytest.raises(ConfigError, match="format = 'html': must be one of markdown, csv, latex"):
        REPORT.render("html")


def test_an_empty_report_renders():
    empty = Report(name="x", caption="nothing", columns=(Column(key="a", header="a"),), rows=[])
    assert empty.to_csv() == "a\n"
    assert_balanced(empty.to_latex())
    assert text(empty, 80)


def test_spread_stands_behind_our_value_and_in_its_own_csv_column():
    column = Column(
        key="accuracy", header="accuracy %", format=".1f", paper_key="paper", spread_key="sd"
    )
    rows = [
        {"accuracy": 71.04, "sd": 1.26, "paper": 74.6},
        {"accuracy": 50.0, "sd": None, "paper": None},
        {},
    ]
    assert [column.cell(row) for row in rows] == ["71.0 ± 1.3 | 74.6", "50.0 | -", "- | -"]
    report = Report(name="demo", caption="demo", columns=(column,), rows=rows[:1])
    assert report.render("csv").splitlines() == ["accuracy,sd,paper", "71.04,1.26,74.6"]
    assert r"71.0 $\pm$ 1.3" in report.render("latex")
