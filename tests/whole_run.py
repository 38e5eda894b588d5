"""A whole run on a tiny model, as a command of its own that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

STEPS = 12
BARE = ("--evaluation.enabled=false", "--tracking.enabled=false")
# of what is started in a process of its own: a second worker costs its imports
ONE_CORE = ("--cluster.num_cpus=1",)


def command(folder: Path, model: Path, out: Path, *extra: str) -> list[str]:
    options = {
        "data.source": "image_folder",
        "data.path": folder,
        "model.path": model,
        "privacy.epsilon": 8,
        "privacy.accountant": "rdp",
        "privacy.reproducible_seed": 5,
        "saliency.shard_size": 20,
        "finetune.batch_size": 16,
        "finetune.steps": STEPS,
        "finetune.checkpoint_every": 4,
        "finetune.micro_batch_size": 8,
        "finetune.cpus_per_worker": 1,
        "synthesis.n_images": 60,
        "synthesis.steps": 3,
        "synthesis.shard_size": 10,
        "synthesis.num_actors": 1,
        "evaluation.epochs": 2,
        "cluster.num_cpus": 2,
        "out": out,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "sapf_ray.cli", "run", *flags, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "160"} | {
        "MLFLOW_TRACKING_URI": ""
    }


def finish(words: list[str], **variables: str) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment() | variables, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interrupt_when(words: list[str], reached: Callable[[], bool]) -> tuple[int, str]:
    """Starts the command and sends it ctrl-C as soon as ``reached``; exit code and stderr."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # a suite started in the background hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)  # only against a hang
    return process.returncode, said


def kill_when(words: list[str], reached: Callable[[], bool]) -> None:
    """Starts the command and SIGKILLs it as soon as ``reached``, with all of its processes: an
    orphaned worker would train on until Ray misses its driver.
    """
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, (
            f"ended before it could be killed: {process.stderr.read()[-2000:]}"
        )
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.02)
    parent = psutil.Process(process.pid)
    for victim in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run.log.jsonl").read_text().splitlines()]


def releases(ledger: Path) -> list[str]:
    if not ledger.exists():
        return []
    return [
        json.loads(line).get("release", "")
        for line in ledger.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
