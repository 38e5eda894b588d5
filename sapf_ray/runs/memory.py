"""Peak memory of a stage: what its processes on this machine hold together, sampled while it runs.

Main memory is the resident set of this process and of Ray's busy workers; GPU memory is what
``nvidia-smi`` shows in use on this machine's devices, whoever uses them. Other nodes of a cluster
are not seen, and runs at the same time on this one
are: for figures of one run alone, run it alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.5  # seconds between samples
_GPU_EVERY = 4  # samples
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MB = 2**20


@dataclass
class Peak:
    """Largest samples so far, in MB; 0 where there is nothing to sample (no /proc, no NVIDIA GPU)."""

    main: float = 0.0
    gpu: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Samples from here to the end of the block."""
    peak, stop = Peak(), threading.Event()
    gpu = shutil.which("nvidia-smi") is not None

    def watch() -> None:
        for sample in range(1 << 62):
            peak.main = max(peak.main, resident_mb())
            if gpu and sample % _GPU_EVERY == 0:
                peak.gpu = max(peak.gpu, _gpu_mb())
            if stop.wait(INTERVAL):
                return

    thread = threading.Thread(target=watch, daemon=True, name="memory")
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def resident_mb() -> float:
    """Of this process and Ray's busy workers on this machine; other grid cells' drivers are left
    out.
    """
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
            busy = title.startswith(b"ray::") and not title.startswith(
                (b"ray::IDLE", b"ray::cell", b"ray::ImplicitFunc")
            )
            if busy or entry.name == str(os.getpid()):
                total += int((entry / "statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError):
            continue  # ended meanwhile, or another user's
    return total / _MB


def _gpu_mb() -> float:
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return float(sum(int(line) for line in shown.split()))
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0
