"""Whole runs of the command on a tiny model, for faults that only a whole run can have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.chaos import kill_tree
from sapf_ray.privacy.ledger import Ledger
from tests.faults.processes import wait_for

STEPS = 16


def make_folder(root: Path) -> Path:
    """Two classes of 40 PNGs, 20x28 pixels."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark_cell", "bright_cell")):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = generator.integers(0, 100, (28, 20, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


class Command:
    """``sapf run`` with one tiny config; every start of it is the same command."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        out: Path,
        *extra: str,
        program: tuple[str, ...] = ("-m", "sapf_ray.cli"),
    ) -> None:
        options = {
            "data.source": "image_folder",
            "data.path": folder,
            "model.path": model,
            "privacy.epsilon": 8,
            "privacy.accountant": "rdp",
            "privacy.reproducible_seed": 5,
            "saliency.shard_size": 10,
            "finetune.batch_size": 16,
            "finetune.steps": STEPS,
            "finetune.micro_batch_size": 8,
            "finetune.num_workers": 2,
            "finetune.cpus_per_worker": 1,
            "finetune.checkpoint_every": 4,
            "synthesis.n_images": 60,
            "synthesis.steps": 3,
            "synthesis.shard_size": 10,
            "synthesis.num_actors": 2,
            "evaluation.enabled": "false",
            "tracking.enabled": "false",
        }
        options |= {
            word.split("=", 1)[0].removeprefix("--"): word.split("=", 1)[1] for word in extra
        }
        if "cluster.address" not in options:
            options["cluster.num_cpus"] = 2
        self.out, self.ledger = out, out / "ledger.jsonl"
        self.words = [
            sys.executable,
            *program,
            "run",
            f"--out={out}",
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        # sockets below have a limit of 107 characters
        self.ray_dir = Path(tempfile.mkdtemp(prefix="sapf", dir="/tmp"))
        self.close = weakref.finalize(self, shutil.rmtree, self.ray_dir, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "COLUMNS": "160",
            "MLFLOW_TRACKING_URI": "",
            "RAY_TMPDIR": str(self.ray_dir),
        }

    @property
    def session(self) -> Path:
        return self.ray_dir / "ray" / "session_latest"

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """The command at work; killed with all its processes when the block ends."""
        process = subprocess.Popen(
            self.words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.communicate()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        with self.started() as process:
            printed, said = process.communicate(timeout=280)
        assert process.returncode == 0, said[-3000:]
        return subprocess.CompletedProcess(self.words, 0, printed, said)

    def kill_driver_when(self, what: str, reached) -> None:
        """SIGKILL of the driver alone; Ray ends the rest."""
        with self.started() as process:
            wait_for(what, reached, lambda: process.poll() is None)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    def releases(self) -> list[str]:
        if not self.ledger.exists():
            return []
        lines = self.ledger.read_text().splitlines(keepends=True)[1:]
        return [json.loads(line)["release"] for line in lines if line.endswith("\n")]


def assert_paid_once(out: Path, steps: int = STEPS) -> None:
    """Every release is charged exactly once, and the sum is within the plan."""
    ledger = Ledger.open(out / "ledger.jsonl")
    charged = [event.release for event in ledger.events() if not event.replay]
    assert sorted(charged) == sorted(["selection", *(f"finetune/step/{i}" for i in range(steps))])
    assert ledger.epsilon_spent() <= ledger.plan.epsilon
