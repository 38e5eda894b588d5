"""Progress where the output is no terminal."""

from __future__ import annotations

import io
import time

from rich.console import Console

from sapf_ray.report.terminal import progress_bars, progress_lines, show_progress


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_a_line_when_a_stage_begins_and_while_nothing_is_reported():
    console = plain()
    with progress_lines(console, every=0.1) as update:
        time.sleep(0.25)
        update("latents", 0, 0)
        update("finetune", 0, 0)
        for done in range(50):
            update("finetune", done, 1_200)
        time.sleep(0.15)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "sapf: 0:00  starting"
    assert "sapf: 0:00  latents" in lines and "sapf: 0:00  finetune" in lines
    assert lines[-1] == "sapf: 0:00  finetune 49/1,200"
    assert len(lines) < 10, "one line a time, however often a stage reports"


def test_the_default_is_a_line_every_ten_seconds_at_least():
    assert progress_lines.__wrapped__.__kwdefaults__["every"] <= 10


def test_bars_stay_in_terminals():
    assert show_progress(plain()).gen.__name__ == "progress_lines"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert show_progress(terminal).gen.__name__ == "progress_bars"
    with progress_bars(terminal) as update:
        update("evaluation", 0, 0)
        update("latents", 0, 0)
        update("latents", 2, 4)
    shown = terminal.file.getvalue()
    assert "evaluation" in shown and "1/1" in shown and "2/4" in shown
