"""What every stage of a run leans on: its clock, the ledger, and the run's secret noise."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from sapf_ray.config import RunConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.models.public_model import content_hash
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs import runlog, worktime
from sapf_ray.runs.directory import RunDirectory, keep_fingerprint
from sapf_ray.runs.fingerprint import run_fingerprint
from sapf_ray.runs.memory import Peak, peak_memory


@dataclass(kw_only=True)
class Stages:
    """Time, orchestration and peak memory of stages. Times add up over the starts of a run, as far
    as these ended the stage.

    Args:
        since: ``time.time()`` at which this start of the run began.
    """

    run: RunDirectory
    since: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)
    orchestration: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"peak_memory_mb": {}, "peak_gpu_memory_mb": {}}
    )

    def __post_init__(self) -> None:
        self._inside = 0.0  # seconds of this start in stages
        if self.run.timings.exists():
            self.seconds = self.run.read_json(self.run.timings)
        if self.run.orchestration.exists():
            self.orchestration = self.run.read_json(self.run.orchestration)
        if self.run.memory.exists():
            self.memory = self.run.read_json(self.run.memory)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, begun = time.monotonic(), time.time()
        with runlog.stage_events(name):
            with peak_memory() as peak, worktime.collecting() as worked:
                yield
            self._done(
                name,
                time.monotonic() - start,
                worktime.covered(worked, begun, end=time.time()),
                peak,
            )

    def _done(self, name: str, seconds: float, compute: float, peak: Peak) -> None:
        self._inside += seconds
        idle = max(0.0, seconds - compute)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        self.orchestration[name] = round(self.orchestration.get(name, 0.0) + idle, 2)
        runlog.event("stage_ended", seconds=round(seconds, 2), orchestration=round(idle, 2))
        self.run.write_json(self.run.timings, self.seconds)
        self.run.write_json(self.run.orchestration, self.orchestration)
        for key, value in (("peak_memory_mb", peak.main), ("peak_gpu_memory_mb", peak.gpu)):
            if value:
                self.memory[key][name] = max(self.memory[key].get(name, 0.0), round(value, 1))
        self.run.write_json(self.run.memory, self.memory)

    def cost(self) -> dict[str, float]:
        """Orchestration up to now, as :mod:`sapf_ray.runs.worktime` defines it.

        Returns:
            Seconds of each stage; ``outside_stages``, seconds of this start in which no stage was
            under way (the driver's imports, checks, Ray's start and end, epsilon, MLflow);
            ``total_share`` of all of them in the run's wall time, in [0, 1]. Of earlier starts only
            the stages that they finished count.
        """
        outside = max(0.0, time.time() - self.since - self._inside)
        known = [self.seconds.get(name, 0.0) for name in self.orchestration]
        share = (sum(self.orchestration.values()) + outside) / max(sum(known) + outside, 1e-9)
        return {
            **self.orchestration,
            "outside_stages": round(outside, 2),
            "total_share": round(share, 4),
        }


def privacy_note(plan: PrivacyPlan, spent: float) -> str:
    """The data set card's paragraph; the run's privacy card has the whole story."""
    if not plan.reads_images:
        return "The model was not fine-tuned: no sensitive image was read."
    if plan.non_private:
        return (
            "**Not private**: sensitive images were used without noise. Do not share these images."
        )
    return (
        f"Differentially private with ε = {spent:.4g} at δ = {plan.delta:.3g}, for adding or removing one of "
        f"{plan.n_records:,} training images ({plan.accountant.upper()} accountant). The run's `privacy_card.md` lists every "
        "use of the sensitive images."
    )


def open_ledger(directory: RunDirectory, plan: PrivacyPlan) -> Ledger:
    """The run's ledger: begun now, or the one that an earlier start of the same plan began.

    Raises:
        RunDirectoryError: It is of another plan, or gone while results that it paid for are there.
    """
    if directory.ledger.exists():
        ledger = Ledger.open(directory.ledger)
        ledger.check_continuable()
        if ledger.plan != plan:
            raise RunDirectoryError(
                f"{directory.ledger}: was begun under another plan (data size or version of sapf changed?); "
                "start a new run in another directory"
            )
        return ledger
    results = (directory.selection, directory.checkpoints, directory.adapter, directory.generations)
    made = [path for path in results if path.exists()]
    if made:
        raise RunDirectoryError(
            f"{directory.ledger}: gone, but {made[0].name} was made from what it paid for; restore it, or start a new run in "
            "another directory"
        )
    directory.write_json(directory.plan, plan.to_dict())
    return Ledger.create(directory.ledger, plan)


def noise_of(
    config: RunConfig,
    directory: RunDirectory,
    *,
    plan: PrivacyPlan,
    source: ImageSource,
    ledger: Ledger,
) -> tuple[NoiseKey, str]:
    """The run's bound key and its public fingerprint, before anything sensitive is used.

    The key is bound to the run's fingerprint: see :mod:`sapf_ray.runs.fingerprint`.
    """
    if ledger.events() and not directory.noise_key.exists():
        raise BudgetError(
            f"{directory.noise_key}: gone, but {directory.ledger.name} shows releases already paid for; they cannot be "
            "replayed without it and the budget does not pay them twice; start a new run in another directory"
        )
    directory.prepare_private()
    secret = NoiseKey.load_or_create(directory.noise_key, config.privacy.reproducible_seed)
    fingerprint = run_fingerprint(
        config,
        plan,
        data=_same_data(directory, source),
        weights=content_hash(config.model.path),
    )
    key = secret.bind(fingerprint)
    return key, key.stream_id("run")


def _same_data(directory: RunDirectory, source: ImageSource) -> str:
    """The data's fingerprint; refuses to continue on other data, where old noise must not meet new
    sums.
    """
    fingerprint = source.fingerprint()
    keep_fingerprint(
        directory.data_fingerprint,
        fingerprint,
        refusal=f"--out {directory.root}: the data set changed since this run began; start a new run in another directory",
    )
    return fingerprint
