"""What every stage of a run leans on, opened once and handed on."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapf_ray.config import RunConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.data.units import Units
from sapf_ray.files import short_hash
from sapf_ray.models.feature_table import record_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.fixed_point import ONE_VOTE
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.privacy.session import changed_parts, keep_fingerprint, open_key, open_ledger
from sapf_ray.privacy.verdict import PrivacyNote, Verdict, check_release, foreseen, judge
from sapf_ray.runs import runlog
from sapf_ray.runs.clock import Clock
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.fingerprint import run_fingerprint
from sapf_ray.runs.gauges import Meter
from sapf_ray.runs.origin import origin
from sapf_ray.runs.storage import Storage
from sapf_ray.runs.tracking import Tracker
from sapf_ray.stages import Stage

if TYPE_CHECKING:
    import numpy as np

    from sapf_ray.models.public_features import Features

CHANGED_PARTS = {
    "weights": "the public model's files",
    "versions": "the versions of libraries",
}
"""How a part of the run's fingerprint is called in a message; other parts by their name."""

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One start of a run.

    What touches the sensitive images (latents, data fingerprint, noise key) is made when a stage
    first asks for it, so a run whose results are there reads none of them.

    Attributes:
        config: The whole experiment.
        source: The images; opening it read none.
        model: The public model; opening it read no weights.
        plan: What may be released, and with how much noise.
        directory: Everything the run leaves behind.
        tracker: The run's MLflow entry, or a silent one.
        clock: Time and memory of each stage.
        on_progress: Called with (stage, done, total); total is 0 where it is not known.
        scores: What synthesis and evaluation measured, by name.
    """

    config: RunConfig
    source: ImageSource
    model: PublicModel
    plan: PrivacyPlan
    directory: RunDirectory
    tracker: Tracker
    clock: Clock
    on_progress: Progress | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def meter(self) -> Meter:
        """Prometheus gauges; needs a Ray that is up."""
        return Meter(self.directory.root.name, self.plan.epsilon)

    def begin(self, stage: Stage) -> None:
        """Tells that a stage begins, before the number of its units is known."""
        if self.on_progress is not None:
            self.on_progress(stage, 0, 0)

    def report(self, stage: Stage) -> Callable[[int, int], None]:
        """Where a stage reports how many of its units are done."""

        def show(done: int, total: int) -> None:
            self.meter.progress(stage, done, total=total)
            if self.on_progress is not None:
                self.on_progress(stage, done, total)

        return show

    @functools.cached_property
    def storage(self) -> Storage | None:
        """Where results are published, if anywhere."""
        place = self.config.cluster.storage
        return Storage(place, self.directory) if place else None

    @property
    def checkpoints(self) -> Path | str:
        """Folder or URI of fine-tuning's checkpoints."""
        return self.directory.checkpoints if self.storage is None else self.storage.checkpoints

    @functools.cached_property
    def ledger(self) -> Ledger:
        """The ledger, begun at the first start.

        Raises:
            RunDirectoryError: See :func:`sapf_ray.privacy.session.open_ledger`.
        """
        directory = self.directory
        return open_ledger(
            directory.ledger,
            self.plan,
            plan_file=directory.plan,
            paid_for=(
                directory.grounding,
                directory.head,
                directory.selection,
                directory.checkpoints,
                directory.adapter,
                directory.generations,
            ),
            origin=lambda: origin(
                self.config, directory, source=self.source.whole if self.plan.reads_images else None
            ),
        )

    @functools.cached_property
    def spent(self) -> float:
        """Epsilon of all releases; asked for once the stages that release are over."""
        return self.ledger.epsilon_spent()

    @property
    def privacy_note(self) -> PrivacyNote:
        """What the README of a data set says of its privacy."""
        return self.verdict.note

    @functools.cached_property
    def verdict(self) -> Verdict:
        """What the results may be called; asked for once the stages that release are over."""
        return judge(self.plan, self.ledger, reproducible=self._reproducible, spent=self.spent)

    def publish(self) -> None:
        """Copies what may leave the run directory to ``cluster.storage``, where there is one.

        Raises:
            BudgetError: The results are not for release.
            RunDirectoryError: The storage failed.
        """
        if self.storage is not None:
            check_release(self.verdict, self.config.cluster)
            self.storage.publish()

    @property
    def _reproducible(self) -> bool:
        """Whether noise comes from a known seed."""
        return self.config.privacy.is_seeded

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """Of the sensitive images, the same at every start.

        Raises:
            RunDirectoryError: The data set changed since the run began.
        """
        fingerprint = self.source.fingerprint()
        self.directory.prepare_private()
        keep_fingerprint(
            self.directory.data_fingerprint,
            fingerprint,
            refusal=f"--out {self.directory.root}: the data set changed since this run began; "
            "start a new run in another directory",
        )
        return fingerprint

    @property
    def records_fingerprint(self) -> str:
        """Of the images and, where there are groups, of who is in which."""
        units = self.source.units
        if units is None:
            return self.data_fingerprint
        return short_hash([self.data_fingerprint, units.digest()])

    @functools.cached_property
    def units_file(self) -> str:
        """Private file of the groups as this run uses them; empty where each image is a unit."""
        units = self.source.units
        if units is None:
            return ""
        most = self.config.data.max_images_per_group
        if most is not None:
            units = units.capped(most, self.key)
        path = self.directory.private / "units.npy"
        self.directory.prepare_private()
        units.save(path)
        return str(path.resolve())

    @property
    def vote_parts(self) -> np.ndarray | None:
        """Each image's part of its group's one vote; None where each image has its own."""
        return Units.load(self.units_file).parts(ONE_VOTE) if self.units_file else None

    @functools.cached_property
    def key(self) -> NoiseKey:
        """The run's secret, bound to all that its noise belongs to: the one source of noise,
        samples and diffusion draws.

        Raises:
            BudgetError: See :func:`sapf_ray.privacy.session.open_key`.
            RunDirectoryError: The data set changed since the run began.
        """
        if not self.ledger.events():
            self.directory.prepare_private()
        secret = open_key(
            self.directory.noise_key,
            self.ledger,
            reproducible_seed=self.config.privacy.reproducible_seed,
        )
        fingerprint = run_fingerprint(
            self.config,
            self.plan,
            data=self.records_fingerprint,
            weights=self.model.content_hash,
        )
        self._say_what_changed(fingerprint)
        return secret.bind(fingerprint)

    def _say_what_changed(self, fingerprint: Mapping[str, Any]) -> None:
        """Logs and prints one line where noise is not what it was at an earlier start."""
        changed = changed_parts(self.directory.fingerprint, fingerprint)
        if not changed:
            return
        runlog.event("fingerprint_changed", runlog.WARNING, parts=", ".join(changed))
        logging.getLogger(__name__).warning(
            "sapf: warning: %s changed since this run began: its releases get other noise and are "
            "charged again, as far as the budget allows",
            " and ".join(CHANGED_PARTS.get(part, part) for part in changed),
        )

    @functools.cached_property
    def canaries(self) -> Canaries | None:
        """The virtual records of a run that is audited; None in any other."""
        if self.config.audit.canaries == 0:
            return None
        canaries = Canaries(
            count=self.config.audit.canaries,
            n_records=self.source.n_units,
            key=self.key,
            folder=str(self.directory.observations.resolve()),
        )
        canaries.prepare()
        return canaries

    @functools.cached_property
    def releaser(self) -> Releaser:
        """The one door from exact sums to what may be seen.

        Raises:
            BudgetError: See :func:`sapf_ray.privacy.session.open_key`.
            RunDirectoryError: The data set changed since the run began.
        """
        return Releaser(
            key=self.key,
            ledger=self.ledger,
            plan=self.plan,
            on_change=runlog.release_changed,
            canaries=self.canaries,
            n_units=self.source.n_units,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per class: the source's, or those that grounding assigned."""
        path = self.directory.grounding
        if not path.exists():
            return self.source.prompts
        assigned = self.directory.read_json(path).get("prompts", {})
        names = zip(self.source.class_names, self.source.prompts, strict=True)
        return tuple(assigned.get(name, prompt) for name, prompt in names)

    @functools.cached_property
    def features(self) -> Features | None:
        """Public features that are kept of the records, where a remedy compares images."""
        return record_features(self.config, self.plan)

    @functools.cached_property
    def latents(self) -> Path:
        """Folder of the encoded images, of their own for each data set, model and features."""
        shared = self.config.cluster.latents_dir
        folder = self.directory.latents if shared is None else Path(shared)
        kept = None if self.features is None else self.features.key
        return folder / self.model.latents_key(self.data_fingerprint, self.source.prompts, kept)


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    out: str,
    *,
    source: ImageSource,
    model: PublicModel,
    plan: PrivacyPlan,
    on_progress: Progress | None,
    since: float,
) -> Iterator[RunContext]:
    """Claims the run directory and yields the context of one start; logs its begin and end.

    Args:
        config: The whole experiment.
        out: Run directory; created, or one that an earlier start of the same config left.
        source: The images.
        model: The public model.
        plan: The privacy plan.
        on_progress: Called with (stage, done, total).
        since: ``time.time()`` from which on time counts as the run's.

    Raises:
        RunDirectoryError: The directory is in use, holds another run, or cannot be written.
        TrackingError: The MLflow store cannot be reached.
        ConfigError: ``cluster.storage`` cannot be used.
    """
    directory = RunDirectory(out)
    resumed = directory.claim(config)
    try:
        if config.cluster.storage:
            check_release(foreseen(plan, reproducible=config.privacy.is_seeded), config.cluster)
            Storage(config.cluster.storage, directory)  # fails now rather than at the end
        tracker = Tracker.open(config, directory)
        place = runlog.Place(path=str(directory.log.resolve()), run=directory.run_id())
        try:
            with runlog.start_of_run(place, resumed):
                yield RunContext(
                    config=config,
                    source=source,
                    model=model,
                    plan=plan,
                    directory=directory,
                    tracker=tracker,
                    clock=Clock(directory, since),
                    on_progress=on_progress,
                )
        except BaseException as error:
            tracker.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    finally:
        directory.release()
