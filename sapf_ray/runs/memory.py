"""Peak memory of a stage: what its processes on this machine hold together, sampled while it runs.

Main memory is the resident set of this process and of Ray's busy workers; GPU memory is what
``nvidia-smi`` shows in use on this machine's devices, whoever uses them. Other nodes of a cluster
are not seen, and runs at the same time on this one are: for figures of one run alone, run it alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

INTERVAL = 0.5  # seconds between samples

_GPU_EVERY = 4  # samples
_MB = 2**20
_NOT_BUSY = ("ray::IDLE", "ray::cell", "ray::ImplicitFunc")  # the last two wait for other processes
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


@dataclass
class Peak:
    """Largest samples so far, in MB; 0 where there is nothing to sample (no NVIDIA GPU)."""

    main: float = 0.0
    gpu: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Samples from here to the end of the block."""
    peak = Peak()
    stop = threading.Event()
    has_gpu = shutil.which(_NVIDIA_SMI[0]) is not None

    def watch() -> None:
        sample = 0
        while True:
            peak.main = max(peak.main, resident_mb())
            if has_gpu and sample % _GPU_EVERY == 0:
                peak.gpu = max(peak.gpu, _gpu_mb())
            if stop.wait(INTERVAL):
                return
            sample += 1

    thread = threading.Thread(
        target=watch,
        daemon=True,
        name="memory",
    )
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def resident_mb() -> float:
    """Resident memory of this process and of Ray's busy workers on this machine.

    The drivers of other cells of a grid are left out.
    """
    total = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or another user's
            if process.pid == os.getpid() or _is_busy_worker(process):
                total += process.memory_info().rss
    return total / _MB


def _is_busy_worker(process: psutil.Process) -> bool:
    """Whether a Ray task or actor runs in it; Ray puts that into the command line."""
    title = " ".join(process.cmdline())
    return title.startswith("ray::") and not title.startswith(_NOT_BUSY)


def _gpu_mb() -> float:
    try:
        shown = subprocess.run(
            _NVIDIA_SMI,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return float(sum(int(line) for line in shown.stdout.split()))
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0
