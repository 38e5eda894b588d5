"""A finished run, opened again to make more from what it released."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import RunDirectoryError
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.runs import runlog
from sapf_ray.runs.clock import Clock
from sapf_ray.runs.context import Progress, RunContext
from sapf_ray.runs.directory import ResultDirectory
from sapf_ray.runs.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class FinishedRun(RunContext):
    """A finished run, opened to make more from what it released.

    Its ledger is read and never written, and nothing can be released.

    Attributes:
        changed: Keys whose values are not the run's, with the run's and the new one.
    """

    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return Ledger.open(self.directory.ledger)

    @property
    def privacy_note(self) -> PrivacyNote:
        """As the run's, and where these images come from."""
        note = super().privacy_note
        run = self.directory.root.resolve().name
        changes = ", ".join(f"`{key}: {new}`" for key, (_, new) in self.changed.items())
        text = (
            f"{note.text}\n\nMade after the run `{run}` had ended, from what it "
            f"released, with {changes or 'unchanged settings'}. That is post-processing: ε and δ "
            "are the run's, for its images and these together."
        )
        return replace(note, text=text)

    @functools.cached_property
    def data_fingerprint(self) -> str:
        raise self._refusal()

    @functools.cached_property
    def key(self) -> NoiseKey:
        raise self._refusal()

    @functools.cached_property
    def releaser(self) -> Releaser:
        raise self._refusal()

    def _refusal(self) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.directory.root}: the run is finished, nothing more can be released from its "
            "images; start a new run in another directory"
        )


@contextlib.contextmanager
def open_result(
    config: RunConfig,
    directory: ResultDirectory,
    *,
    source: ImageSource,
    model: PublicModel,
    plan: PrivacyPlan,
    changed: Mapping[str, tuple[Any, Any]],
    on_progress: Progress | None,
    since: float,
) -> Iterator[FinishedRun]:
    """Claims the folder of a result and yields the context of one start; logs its begin and end.

    Args:
        config: The run's config with what is changed.
        directory: The result's folder.
        source: The images that scores are measured on, or the bare classes.
        model: The public model.
        plan: The run's privacy plan.
        changed: Keys whose values are not the run's, with the run's and the new one.
        on_progress: Called with (stage, done, total).
        since: ``time.time()`` from which on time counts as the result's.

    Raises:
        RunDirectoryError: The folder is in use, holds another result, or cannot be written.
    """
    resumed = directory.claim(config)
    place = runlog.Place(path=str(directory.log.resolve()), run=directory.run_id())
    try:
        with runlog.start_of_run(place, resumed):
            yield FinishedRun(
                config=config,
                source=source,
                model=model,
                plan=plan,
                directory=directory,
                tracker=Tracker(None, None),  # opened when there are results
                clock=Clock(directory, since),
                on_progress=on_progress,
                changed=changed,
            )
    finally:
        directory.release()
