"""The harness: contenders as processes that stay alive and take their steps in turn."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.models import Case
from sapf_ray.cluster import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900.0  # seconds for one answer
Log = Callable[[str], None]


class ContenderError(RuntimeError):
    """The contender answered with an error, died or did not answer in time."""


class Process:
    """A running :mod:`jobs.bench.worker`.

    Args:
        tuned: Run with the allocator settings that all processes of ``sapf`` get; otherwise with
            the stock ones.
    """

    def __init__(self, tuned: bool, threads: int) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if tuned:
            environment |= {k: v for k, v in ENVIRONMENT.items() if k.startswith("MALLOC_")}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self.child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "jobs.bench.worker"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def send(self, **request: Any) -> None:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # receive() says why

    def receive(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], TIMEOUT)
        if not ready:
            raise ContenderError(f"no answer within {TIMEOUT:.0f} s")
        line = self.child.stdout.readline()
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or [""])[-1]
            raise ContenderError(f"died with exit code {self.child.wait()} {last}".strip())
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self.log.close()


@dataclass(kw_only=True)
class Entry:
    """One row of a group: a contender and the case it gets.

    ``label`` is its name in figures and tables.
    """

    label: str
    contender: str
    case: Case
    tuned: bool


@dataclass(kw_only=True)
class Measured:
    """What the steps of one contender took.

    Attributes:
        seconds: One per round.
        memory: Peak bytes in each round: CUDA's where the case runs there, else resident memory.
        baseline: Bytes after setup, before the first step.
        flops: Operations of one step's matrix products; None where not counted.
        result: Last step's return value as an array; None where not requested.
    """

    case: Case
    baseline: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    flops: int | None = None
    result: np.ndarray | None = None


def measure(
    entries: list[Entry],
    repeats: int,
    *,
    log: Log,
    flops: tuple[str, ...] = (),
    results: tuple[str, ...] = (),
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Runs the contenders of a group; on CPU round by round, so that noise hits all alike.

    On CUDA they run one after another: processes would have to share the memory.

    Args:
        flops: Labels whose operations are counted in one more step.
        results: Labels whose last result is fetched.

    Returns:
        Measurements by label, and the error of each contender that failed.
    """
    measured: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    together = [entries] if all(e.case.device == "cpu" for e in entries) else [[e] for e in entries]
    for group in together:
        _measure_together(
            group,
            repeats,
            log=log,
            flops=flops,
            results=results,
            measured=measured,
            failures=failures,
        )
    return measured, failures


def _measure_together(
    entries: list[Entry],
    repeats: int,
    *,
    log: Log,
    flops: tuple[str, ...],
    results: tuple[str, ...],
    measured: dict[str, Measured],
    failures: dict[str, str],
) -> None:
    processes = {e.label: Process(e.tuned, e.case.threads) for e in entries}
    cases = {e.label: e.case for e in entries}

    def attempt(label: str, action: Callable[[Process], Any]) -> Any:
        if label in failures:
            return None
        try:
            return action(processes[label])
        except ContenderError as error:
            failures[label] = str(error)
            measured.pop(label, None)
            processes[label].close()
            log(f"  {label}: {error}")
            return None

    try:
        for e in entries:  # all set up at the same time: nothing is measured yet
            processes[e.label].send(setup=e.contender, case=asdict(e.case))
        for label, case in cases.items():
            answer = attempt(label, Process.receive)
            if answer is not None:
                baseline = answer.get("cuda", answer["rss"])
                measured[label] = Measured(case=case, baseline=baseline)
        for repeat in range(-1, repeats):  # the first round warms up
            for label in cases:
                answer = attempt(label, lambda process: process.ask(step=True))
                if answer is not None and repeat >= 0:
                    measured[label].seconds.append(answer["seconds"])
                    measured[label].memory.append(answer.get("cuda", answer["rss"]))
        for label in cases:
            if label in failures:
                continue
            if label in results:
                measured[label].result = _fetch(processes[label])
            if label in flops:
                try:
                    measured[label].flops = processes[label].ask(flops=True)["flops"]
                except ContenderError as error:
                    log(f"  {label}: operations not counted ({error})")
    finally:
        for process in processes.values():
            process.close()


def _fetch(process: Process) -> np.ndarray:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.npy"
        process.ask(save=str(path))
        return np.load(path)
