"""Lines for people."""

from __future__ import annotations

from rich.console import Console


def note(console: Console, line: str, *, secret: bool) -> None:
    """A line about the data; what tells of single records is shown on a terminal, never logged."""
    if console.is_terminal or not secret:
        say(console, f"note: {line}")


def say(console: Console, line: str) -> None:
    console.print(f"sapf: {line}", markup=False, highlight=False, soft_wrap=True)
