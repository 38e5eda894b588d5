"""A whole run on a model of full width, and what each of its processes took of memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.whole_run import environment

INTERVAL = 1.0  # seconds between two looks at /proc


@dataclass(kw_only=True)
class Process:
    """One process of a run: its latest title that says something, and its peaks in bytes."""

    title: str = ""
    own: int = 0  # what it alone holds
    resident: int = 0  # files shared with others included
    cpu_seconds: float = 0.0


@dataclass(kw_only=True)
class Peaks:
    """What was seen of a run's processes.

    Attributes:
        processes: By number.
        total: Peak of all together, in bytes; what they share counts once.
        seconds: Wall time of the run.
    """

    processes: dict[int, Process] = field(default_factory=dict)
    total: int = 0
    seconds: float = 0.0

    def look(self, running: list[psutil.Process]) -> None:
        """Takes the present values in."""
        shares = 0
        for process in running:
            try:
                title = _title_of(process)
                sizes = _sizes(process.pid)
                times = process.cpu_times()
            except (psutil.Error, OSError):
                continue
            shares += sizes["Pss"]
            peak = self.processes.setdefault(process.pid, Process())
            peak.title = title or peak.title
            peak.own = max(peak.own, sizes["Private_Clean"] + sizes["Private_Dirty"])
            peak.resident = max(peak.resident, sizes["Rss"])
            peak.cpu_seconds = times.user + times.system
        self.total = max(self.total, shares)

    def of(self, title: str) -> int:
        """Peak of what the largest process of that title alone held, in bytes."""
        return max(peak.own for peak in self.processes.values() if peak.title == title)

    def lines(self, least: int = 10**8) -> Iterator[str]:
        """A table of the processes that held more than ``least`` bytes."""
        yield f"{'process':32} {'own GB':>7} {'resident GB':>12} {'core s':>7}"
        for peak in sorted(self.processes.values(), key=lambda peak: -peak.own):
            if peak.own >= least:
                sizes = f"{peak.own / 1e9:7.2f} {peak.resident / 1e9:12.2f}"
                yield f"{peak.title:32} {sizes} {peak.cpu_seconds:7.0f}"
        yield f"{'all, shared files once':32} {self.total / 1e9:7.2f}"
        cores = sum(peak.cpu_seconds for peak in self.processes.values())
        yield f"wall time {self.seconds:.0f} s; at least {cores:.0f} s of cores"


def watched(words: list[str], folder: Path) -> tuple[Peaks, str]:
    """Runs a command to its end; its peaks, and what it printed."""
    peaks = Peaks()
    began = time.monotonic()
    with (folder / "printed").open("w+") as printed:
        process = subprocess.Popen(
            words, stdout=printed, stderr=subprocess.STDOUT, env=environment()
        )
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            peaks.look([parent, *parent.children(recursive=True)])
            time.sleep(INTERVAL)
        printed.seek(0)
        text = printed.read()
    peaks.seconds = time.monotonic() - began
    assert process.returncode == 0, text[-3000:]
    return peaks, text


def save_images(root: Path, *, n: int, side: int) -> Path:
    """Two classes of random PNGs: n to train on, a quarter as many to test on."""
    generator = np.random.default_rng(0)
    for split, count in (("train", n), ("test", n // 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count // 2):
                pixels = generator.integers(0, 128, (side, side, 3)) + 127 * label
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


def command(model: Path, images: Path, out: Path, **settings: object) -> list[str]:
    """``sapf run`` of 2 steps and 8 synthetic images."""
    options = {
        "data.source": "image_folder",
        "data.path": images,
        "model.path": model,
        "grounding.remedies": "none",
        "saliency.shard_size": 16,
        "saliency.micro_batch_size": 8,
        "finetune.batch_size": 16,
        "finetune.steps": 2,
        "finetune.checkpoint_every": 2,
        "finetune.micro_batch_size": 8,
        "synthesis.n_images": 8,
        "synthesis.steps": 2,
        "synthesis.shard_size": 8,
        "synthesis.num_actors": 1,
        "evaluation.epochs": 1,
        "cluster.num_cpus": 2,
        "out": out,
        **settings,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "sapf_ray.cli", "run", *flags]


def _title_of(process: psutil.Process) -> str:
    """What it does; empty for a worker of Ray that has no task now."""
    words = process.cmdline()
    if "sapf_ray.cli" in words:
        return "driver"
    first = words[0] if words else ""
    if first.startswith("ray::"):
        return "" if first.startswith("ray::IDLE") else " ".join(words)[:32].strip()
    tool = next((Path(word).name for word in words if word.endswith(".py")), Path(first).name)
    return tool[:32]


def _sizes(pid: int) -> dict[str, int]:
    """Name of a size to bytes, of all of a process's memory."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)
    return {name: 1024 * int(number) for name, number in found}
