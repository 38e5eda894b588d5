"""Finding and killing processes of a Ray that this test, or a command it started, owns."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PATIENCE = 240.0  # seconds; only against a hang


def train_ranks(session: Path) -> dict[int, int]:
    """Live process of each rank, by Ray Train's own log of its newest worker group."""
    ranks: dict[int, int] = {}
    logs = [*(session / "logs" / "train").glob("*controller*.log")]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime):
        for pid, rank in re.findall(
            r"pid=(\d+)\) world_rank=(\d+)", log.read_text(errors="replace")
        ):
            ranks[int(rank)] = int(pid)
    return {rank: pid for rank, pid in ranks.items() if psutil.pid_exists(pid)}


def wait_for(
    what: str, reached: Callable[[], object], alive: Callable[[], bool] = lambda: True
) -> None:
    """Polls until ``reached``; fails where the process that should get there is gone."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert alive(), f"ended before {what}"
        assert time.monotonic() < deadline, f"never reached: {what}"
        time.sleep(0.01)


@contextmanager
def once(what: str, reached: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Runs ``act`` on another thread as soon as ``reached``, while the block works; fails if it
    never came to that.
    """
    done = threading.Event()
    failure: list[BaseException] = []

    def watch() -> None:
        try:
            wait_for(what, reached)
            act()
            done.set()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    assert done.wait(1), f"finished without {what}: {failure}"
