"""What this machine has: cores, memory, GPUs, and how fast a core is."""

from __future__ import annotations

import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROBE_SECONDS = 0.019
"""What :func:`probe` takes where runs take what the shipped costs (row ``core``) say. Fitted: on
two quiet cores on which it takes 0.0205 s, the digits took 191 s, a folder of 482 images 156 s. On
the machine of the costs it took 0.030 s, but cores that are faster in this small piece are hardly
faster in a whole run."""

_REPETITIONS = 9
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: its name, and its memory in 10^9 bytes."""

    name: str
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run on this machine can use.

    Attributes:
        cores: Number of cores.
        memory_gb: Main memory in 10^9 bytes.
        gpus: GPUs that torch can use.
        speed: Speed of a core against one of the machine whose costs are shipped.
    """

    cores: int
    memory_gb: float
    gpus: tuple[Gpu, ...] = ()
    speed: float = 1.0

    def words(self) -> str:
        """The machine in a few words."""
        gpus = "no GPU"
        if self.gpus:
            gpus = f"{len(self.gpus)} x {self.gpus[0].name} ({self.gpus[0].memory_gb:.0f} GB)"
        return f"{self.cores} cores, {self.memory_gb:.0f} GB, {gpus}"


def this_machine() -> Machine:
    """Looks at this machine; takes a second or two, for it imports torch."""
    return Machine(
        cores=usable_cores(), memory_gb=usable_memory_gb(), gpus=usable_gpus(), speed=core_speed()
    )


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, less what its container forbids."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _first_line(_CGROUP_CPU).partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def usable_memory_gb() -> float:
    """Main memory in 10^9 bytes, less what its container forbids."""
    import psutil

    size = psutil.virtual_memory().total
    limit = _first_line(_CGROUP_MEMORY)
    if limit.isdecimal():
        size = min(size, int(limit))
    return size / 1e9


def usable_gpus() -> tuple[Gpu, ...]:
    """GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(Gpu(name=properties.name, memory_gb=properties.total_memory / 1e9))
    return tuple(found)


def core_speed() -> float:
    """Speed of a core, all being at work, against one of the machine whose costs are shipped."""
    return PROBE_SECONDS / probe()


def probe() -> float:
    """Seconds of a small piece of a U-Net's work on one core, while all others do the same: cores
    may share units and caches.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cores = usable_cores()
        with ThreadPoolExecutor(cores) as pool:
            times = list(pool.map(_probe_once, range(cores)))
        return sum(times) / len(times)
    finally:
        torch.set_num_threads(threads)


def _probe_once(seed: int) -> float:
    """The median of several times: a machine that is busy now is taken to stay so."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 64, 16, 16, generator=generator)
    kernel = torch.randn(64, 64, 3, 3, generator=generator)
    weights = torch.randn(64, 64, generator=generator)
    seconds = []
    for _ in range(_REPETITIONS):
        begun = time.perf_counter()
        for _ in range(4):
            features = functional.silu(functional.conv2d(images, kernel, padding=1))
            tokens = features.flatten(2).transpose(1, 2) @ weights
            functional.scaled_dot_product_attention(tokens, tokens, tokens)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
