"""One table, four forms: terminal, Markdown, CSV, LaTeX (booktabs).

A :class:`Report` is plain rows plus a description of the columns. A column with a ``paper_key``
shows the pair "ours | paper"; in CSV the pair becomes two columns. Missing cells are marked ``-``
in every form.

Example::

    columns = (
        Column(key="method", header="method"),
        Column(key="fid", header="FID", format=".1f", paper_key="paper_fid"),
    )
    rows = [{"method": "DP-SAPF", "fid": None, "paper_fid": 26.6}]
    report = Report(name="demo", caption="FID", columns=columns, rows=rows)
    print(report.render("markdown"))      # | DP-SAPF | - \\| 26.6 |
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sapf_ray.errors import ConfigError

MISSING = "-"
FORMATS: tuple[str, ...] = ("text", "markdown", "csv", "latex")

# What LaTeX's text mode cannot take as it is; "|" would print as a dash in the standard font
# encoding.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": "$|$",
    "<": "$<$",
    ">": "$>$",
    "ε": r"$\varepsilon$",
    "σ": r"$\sigma$",
    "δ": r"$\delta$",
    "α": r"$\alpha$",
    "≈": r"$\approx$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "√": r"$\surd$",
    "²": "$^2$",
    "∞": r"$\infty$",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one key of the rows is shown.

    Args:
        key: Key of the row; our value where there is a pair.
        header: Column head, with the unit where there is one.
        format: Format spec of numbers, e.g. ``.2f``; other values are shown as they are.
        paper_key: Key of the paper's value; the cell then reads "ours | paper".
        labels: What to show for a value, except in CSV; other values are shown as they are.
        spread_key: Key of our value's standard deviation; shown behind it where there is one.
    """

    key: str
    header: str
    format: str = ""
    paper_key: str | None = None
    labels: Mapping[str, str] | None = None
    spread_key: str | None = None

    @property
    def keys(self) -> list[str]:
        """Keys of the row that the column shows."""
        return [key for key in (self.key, self.spread_key, self.paper_key) if key is not None]

    @property
    def title(self) -> str:
        """Header for people; says which side of a pair is whose."""
        if self.paper_key is None:
            return self.header
        return f"{self.header}, ours | paper"

    def cell(self, row: Mapping[str, Any]) -> str:
        """The cell as text."""
        ours = self._format(row.get(self.key))
        if self.spread_key is not None and not _missing(row.get(self.spread_key)):
            ours += f" ± {self._format(row[self.spread_key])}"
        if self.paper_key is None:
            return ours
        return f"{ours} | {self._format(row.get(self.paper_key))}"

    def _format(self, value: Any) -> str:
        if _missing(value):
            return MISSING
        if _numeric(value):
            return format(value, self.format)
        return (self.labels or {}).get(value, str(value))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A table with its findings.

    Args:
        name: e.g. ``table13``; also the LaTeX label.
        caption: One sentence.
        columns: Columns shown, left to right. Rows may hold more keys.
        rows: One dict a row; None marks a missing cell.
        notes: Findings, one sentence each.
        group_by: Keys; where one of their values changes, a rule is drawn.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()

    def render(self, form: str) -> str:
        """The table as ``markdown``, ``csv`` or ``latex``; ``text`` is what a rich console prints
        of it.

        Raises:
            ConfigError: Another form.
        """
        forms: dict[str, Callable[[], str]] = {
            "markdown": self.to_markdown,
            "csv": self.to_csv,
            "latex": self.to_latex,
        }
        if form not in forms:
            raise ConfigError("format", form, f"must be one of {', '.join(forms)}")
        return forms[form]()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """``console.print(report)``: the table, then the notes. A narrow terminal wraps cells
        between words; only one too narrow for that breaks words and numbers, and nothing is cut
        off."""
        table = Table(
            title=Text(self.caption),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for column, width in zip(self.columns, self._widths(options.max_width), strict=True):
            table.add_column(
                Text(column.title),
                justify="right" if self._is_number(column) else "left",
                overflow="fold",
                width=width,
            )
        for index, row in enumerate(self.rows):
            if self._new_group(index):
                table.add_section()
            table.add_row(*(Text(column.cell(row)) for column in self.columns))
        yield table
        yield from (Text(f"- {note}") for note in self.notes)

    def to_markdown(self) -> str:
        """A GitHub table under a bold caption, notes as a list."""

        def line(cells: Iterable[str]) -> str:
            return f"| {' | '.join(cells)} |"

        def escaped(cells: Iterable[str]) -> list[str]:
            return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]

        rule = ["--:" if self._is_number(column) else ":--" for column in self.columns]
        titles = [column.title for column in self.columns]
        lines = [f"**{self.caption}**", "", line(escaped(titles)), line(rule)]
        for row in self.rows:
            lines.append(line(escaped(column.cell(row) for column in self.columns)))
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """One line of column keys, then values at full precision; no caption and no notes."""
        keys = [key for column in self.columns for key in column.keys]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(keys)
        for row in self.rows:
            writer.writerow([MISSING if _missing(row.get(key)) else row[key] for key in keys])
        return buffer.getvalue()

    def to_latex(self) -> str:
        """A ``table`` environment; needs ``\\usepackage{booktabs}``."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(latex_escape(cell) for cell in cells) + r" \\"

        alignment = "".join("r" if self._is_number(column) else "l" for column in self.columns)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line([column.title for column in self.columns]),
            r"\midrule",
        ]
        for index, row in enumerate(self.rows):
            if self._new_group(index):
                lines.append(r"\midrule")
            lines.append(line([column.cell(row) for column in self.columns]))
        lines += [r"\bottomrule", r"\end{tabular}"]
        if self.notes:
            lines += ["", r"\footnotesize", *(f"{latex_escape(note)}\\par" for note in self.notes)]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def _widths(self, total: int) -> list[int] | list[None]:
        """Column widths in characters, none below its longest word; Nones, rich's own way, where
        that cannot be.
        """
        texts = [
            [column.title, *(column.cell(row) for row in self.rows)] for column in self.columns
        ]
        wanted = [max(map(len, cells)) for cells in texts]
        widths = [
            max((len(word) for cell in cells for word in cell.split()), default=1)
            for cells in texts
        ]
        spare = total - sum(widths) - 2 * (len(widths) - 1)
        if spare < 0:
            return [None] * len(widths)
        for _ in range(min(spare, sum(wanted) - sum(widths))):
            lack = [want - width for want, width in zip(wanted, widths, strict=True)]
            widths[lack.index(max(lack))] += 1
        return widths

    def _is_number(self, column: Column) -> bool:
        """Right-aligned: a pair, or a column without words."""
        values = [row.get(column.key) for row in self.rows]
        return column.paper_key is not None or all(
            _missing(value) or _numeric(value) for value in values
        )

    def _new_group(self, index: int) -> bool:
        if index == 0:
            return False
        return any(
            self.rows[index].get(key) != self.rows[index - 1].get(key) for key in self.group_by
        )


def latex_escape(text: str) -> str:
    """Text for LaTeX's text mode."""
    return re.sub(
        "|".join(re.escape(char) for char in _LATEX), lambda match: _LATEX[match.group()], text
    )


def _numeric(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
