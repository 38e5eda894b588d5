"""Peak memory follows what a block holds while it runs, also where it is freed before the end."""

from __future__ import annotations

import time

import numpy as np

from sapf_ray.runs import memory
from sapf_ray.runs.memory import INTERVAL, peak_memory, resident_mb


def test_peak_sees_what_was_freed_before_the_end(monkeypatch):
    # Ray workers of other tests come and go on this machine.
    monkeypatch.setattr(memory, "_is_busy_worker", lambda process: False)
    before = resident_mb()
    with peak_memory() as peak:
        block = np.ones(400 * 2**20, np.uint8)
        time.sleep(2 * INTERVAL)
        del block
    assert peak.main > before + 300
    with peak_memory() as idle:
        time.sleep(INTERVAL)
    assert idle.main < peak.main - 250
