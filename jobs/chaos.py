"""Random SIGKILLs over runs: does every run end, pay once, and release the same bytes?

Example::

    python -m jobs.chaos --kills 20 --out runs/chaos

Starts a small run on embedded data, kills its driver or one of its Ray processes at random points
of its progress (not of the
clock: on a slow machine most seconds are start-up, where nothing is at stake), and goes on with the
same command until the run is done; then the next run, until all kills are dealt. Everything a run
releases (selection, adapter, images) is compared with a run that nobody disturbed, and its ledger
with the plan. The report is ``chaos.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sapf_ray.files import file_digest
from sapf_ray.privacy.ledger import Ledger

# A small run with every stage that pays or releases; a fixed micro-batch, for its search would
# decide rounding by the clock
RUN = {
    "data.source": "digits",
    "privacy.epsilon": 8,
    "privacy.accountant": "rdp",
    "privacy.reproducible_seed": 1,
    "saliency.sample_rate": 0.2,
    "saliency.shard_size": 32,
    "finetune.steps": 30,
    "finetune.batch_size": 32,
    "finetune.micro_batch_size": 16,
    "finetune.num_workers": 2,
    "finetune.cpus_per_worker": 1,
    "finetune.checkpoint_every": 5,
    "synthesis.n_images": 60,
    "synthesis.steps": 3,
    "synthesis.shard_size": 6,
    "synthesis.num_actors": 2,
    "evaluation.enabled": "false",
    "tracking.enabled": "false",
    "cluster.num_cpus": 2,
}
SPARED = (
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
)  # no work in them, or parts of the machine's own daemon
PATIENCE = 120.0  # seconds without progress after which a kill is dealt all the same
MOST_STARTS = 60  # of one run: a run that needs more makes no progress


@dataclass(kw_only=True)
class Kill:
    """One SIGKILL.

    What it hit, how many seconds after the command's start, and which release the ledger showed
    last.
    """

    victim: str
    seconds: float
    after: str


def ray_workers(root: int, title: str = "ray::") -> list[psutil.Process]:
    """Ray workers below process ``root`` whose title begins with ``title``.

    They are in the order of the process table.
    """
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if words and words[0].startswith(title):
                found.append(process)
    return found


def kill_tree(root: int) -> None:
    """SIGKILL to ``root`` and all below it."""
    with suppress(psutil.NoSuchProcess):
        processes = [*psutil.Process(root).children(recursive=True), psutil.Process(root)]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


def released(out: Path) -> dict[str, str]:
    """SHA-256 of everything a run releases: selection, adapter, images."""
    files = [
        out / "selection.json",
        *(out / "adapter").iterdir(),
        *(out / "synthetic").glob("*.parquet"),
    ]
    return {str(path.relative_to(out)): file_digest(path) for path in sorted(files)}


def unpaid_or_doubled(out: Path) -> list[str]:
    """What is wrong with a finished run's ledger.

    Empty where every release is charged once and the sum is within the plan.
    """
    ledger = Ledger.open(out / "ledger.jsonl")
    assert ledger.plan.finetune is not None
    steps = sum(
        event.release.startswith("finetune/step/") for event in ledger.events() if not event.replay
    )
    charged = Counter(event.release for event in ledger.events() if not event.replay)
    wrong = [
        f"{release}: charged {count} times" for release, count in charged.items() if count != 1
    ]
    if steps != ledger.plan.finetune.count:
        wrong.append(f"{steps} steps charged, {ledger.plan.finetune.count} planned")
    if ledger.epsilon_spent() > ledger.plan.epsilon:
        wrong.append(f"epsilon {ledger.epsilon_spent()} above {ledger.plan.epsilon}")
    return wrong


class Chaos:
    """Deals the kills.

    Args:
        out: Folder of the runs.
        kills: How many in all.
        seed: Seed of their times and victims.
        gap: Most units of progress (a release paid, a shard written) from one kill to the next.
        overrides: Config keys in place of :data:`RUN`'s.
    """

    def __init__(
        self,
        out: Path,
        kills: int,
        *,
        seed: int,
        gap: int,
        overrides: dict[str, str],
    ) -> None:
        self.out = out
        self.kills = kills
        self.gap = gap
        self.options = {**RUN, **overrides}
        self.random = random.Random(seed)
        self.dealt: list[Kill] = []
        self.errors: list[str] = []

    def command(self, run: Path) -> list[str]:
        flags = [f"--{name}={value}" for name, value in self.options.items()]
        return [sys.executable, "-m", "sapf_ray.cli", "run", f"--out={run}", *flags]

    def start(self, run: Path, strike: bool) -> bool:
        """One start of the command, with or without kills; True when the run is done."""
        directory = Path(
            tempfile.mkdtemp(prefix="chaos", dir="/tmp")
        )  # sockets below have a limit of 107 characters
        environment = os.environ | {
            "RAY_TMPDIR": str(directory),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        begun = time.monotonic()
        with open(self.out / "said.txt", "w+") as said:
            process = subprocess.Popen(
                self.command(run),
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=environment,
                start_new_session=True,
            )
            try:
                while strike and process.poll() is None and len(self.dealt) < self.kills:
                    self.wait_for_progress(process, run)
                    if process.poll() is None:
                        self.strike(process, run, seconds=time.monotonic() - begun)
                code = process.wait()
            finally:
                kill_tree(process.pid)
                shutil.rmtree(directory, ignore_errors=True)
            said.seek(0)
            text = said.read().strip()
        if (
            code > 0
        ):  # a worker's death that Ray does not mend by itself: one line, and the same command
            self.errors.append(text.splitlines()[-1] if text else f"exit code {code}")
            if text.count("\n"):
                self.errors[-1] = "traceback: " + self.errors[-1]
        return code == 0

    def wait_for_progress(self, process: subprocess.Popen[bytes], run: Path) -> None:
        mark = progress(run) + self.random.randint(0, self.gap)
        deadline = time.monotonic() + PATIENCE
        working = (
            False  # a start that has not begun to work is no target: there is nothing at stake
        )
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (working and progress(run) >= mark)
        ):
            time.sleep(0.02)
            working = working or any(self.workers(process))
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0.0, 1.0))

    def workers(self, process: subprocess.Popen[bytes]) -> list[tuple[psutil.Process, str]]:
        """Ray processes that do this run's work, with their titles."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for worker in ray_workers(process.pid):
                with suppress(psutil.Error, IndexError):
                    title = worker.cmdline()[0]
                    if not title.startswith(SPARED):
                        found.append((worker, title.split(".")[0].strip()))
        return found

    def strike(
        self,
        process: subprocess.Popen[bytes],
        run: Path,
        *,
        seconds: float,
    ) -> None:
        workers = self.workers(process)
        if workers and self.random.random() < 0.5:
            victim, name = self.random.choice(workers)
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        else:
            name = "driver"
            process.kill()
        self.dealt.append(
            Kill(
                victim=name,
                seconds=round(seconds, 1),
                after=last_release(run),
            )
        )
        print(f"kill {len(self.dealt)}: {self.dealt[-1]}, progress {progress(run)}", flush=True)

    def report(self) -> dict[str, object]:
        """Runs until all kills are dealt and the last run is done."""
        if not self.start(self.out / "undisturbed", False):
            raise SystemExit(f"the undisturbed run failed: {self.errors[-1]}")
        expected = released(self.out / "undisturbed")
        runs: list[dict[str, object]] = []
        while len(self.dealt) < self.kills:
            run = self.out / f"run{len(runs)}"
            first = len(self.dealt)
            starts = 1
            while not self.start(run, len(self.dealt) < self.kills):
                starts += 1
                if starts > MOST_STARTS:
                    raise SystemExit(f"{run}: not done after {MOST_STARTS} starts")
            ledger = Ledger.open(run / "ledger.jsonl")
            runs.append(
                {
                    "kills": len(self.dealt) - first,
                    "starts": starts,
                    "identical": released(run) == expected,
                    "ledger_faults": unpaid_or_doubled(run),
                    "epsilon_spent": ledger.epsilon_spent(),
                    "epsilon_planned": ledger.plan.epsilon,
                    "replayed_steps": sum(event.replay for event in ledger.events()),
                }
            )
            print(f"{run.name}: {runs[-1]}", flush=True)
        return {
            "kills": len(self.dealt),
            "victims": dict(Counter(kill.victim for kill in self.dealt)),
            "runs": runs,
            "all_identical": all(run["identical"] for run in runs),
            "all_paid_once": not any(run["ledger_faults"] for run in runs),
            "errors": self.errors,
            "dealt": [asdict(kill) for kill in self.dealt],
        }


def progress(run: Path) -> int:
    """Releases paid and shards written so far; never falls."""
    with suppress(OSError):
        names = {
            line.split('"release": ')[-1].split(",")[0]
            for line in (run / "ledger.jsonl").read_text().splitlines()[1:]
        }
        return len(names) + len(list((run / "synthetic").glob("*.parquet")))
    return 0


def last_release(run: Path) -> str:
    """The newest line of the run's ledger, by name."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        return json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["release"]
    return "nothing yet"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="SIGKILLs in all",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of their times and victims",
    )
    parser.add_argument(
        "--gap",
        type=int,
        default=4,
        help="most units of progress (releases, shards) between two kills",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/chaos"),
        help="folder of the runs; `undisturbed` in it is kept",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="config key of the runs, e.g. seed=3",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if any(arguments.out.glob("run*")):
        parser.error(f"--out {arguments.out}: holds the runs of another chaos; give another folder")
    overrides = dict(pair.split("=", 1) for pair in arguments.set)
    chaos = Chaos(
        arguments.out,
        arguments.kills,
        seed=arguments.seed,
        gap=arguments.gap,
        overrides=overrides,
    )
    report = chaos.report()
    (arguments.out / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "dealt"}, indent=2))
    return 0 if report["all_identical"] and report["all_paid_once"] else 1


if __name__ == "__main__":
    sys.exit(main())
