"""The stages after the last release, each a function of its context, and what they leave.

They are those of a run and of what is made from a finished one later
(:mod:`sapf_ray.reuse`), so nothing here imports what training needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sapf_ray.config import RunConfig
from sapf_ray.data.base import Split
from sapf_ray.evaluation.inputs import REFERENCE, TEST, TRAIN
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import known_scores, read_for
from sapf_ray.files import write_json
from sapf_ray.grounding.head_labels import labelling
from sapf_ray.grounding.released import in_proportions
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.verdict import Verdict
from sapf_ray.runs.context import RunContext
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.stages import Stage
from sapf_ray.synthesis.launcher import synthesize

Note = Callable[[str, bool], None]  # a line about the data; whether it is for the terminal only


def synthesis(run: RunContext) -> None:
    """Samples the synthetic data set from the public model and the adapter."""
    made = synthesize(
        run.directory.synthetic,
        run.model,
        adapter_dir=run.directory.adapter if trains(run) else None,
        class_names=run.source.class_names,
        prompts=run.prompts,
        config=in_proportions(run),
        seed=run.config.image_seed,
        privacy_note=run.privacy_note,
        donors=run.directory.data_sets(),
        labelling=labelling(run),
        on_progress=run.report(Stage.SYNTHESIS),
    )
    if made.idle_share is not None:
        run.scores["synthesis_idle_share"] = round(made.idle_share, 4)


def pictures(run: RunContext) -> None:
    """A grid of synthetic images."""
    from sapf_ray.pictures import save_sample_grid  # matplotlib

    save_sample_grid(
        run.directory.synthetic, run.source.class_names, path=run.directory.sample_grid
    )


def evaluation(run: RunContext) -> None:
    """Scores the data set against real images: a non-private measurement of research runs."""
    config = run.config.evaluation
    made = run.config.synthesis.side(run.model.resolution)
    scores = evaluate_on_cluster(
        run.directory.synthetic,
        run.source.whole,
        resolution=config.compared_at(run.source.resolution, made),
        config=config,
        seed=run.config.seed,
        known=earlier_scores(run),
        work=run.directory.decoded,
    )
    run.scores.update(scores)


def trains(run: RunContext) -> bool:
    """Whether an adapter is trained."""
    return run.plan.finetune is not None


def evolves(run: RunContext) -> bool:
    """Whether images evolve instead."""
    return run.plan.evolution is not None


def is_secret(run: RunContext) -> bool:
    """Whether the run is a trial of a private choice that is not chosen: its score lies there."""
    return run.plan.score is not None and run.directory.score.exists()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage and when it runs.

    Attributes:
        stage: Its name.
        make: The stage itself, a function of the run.
        needed: Whether this kind of run has the stage.
        done: Whether an earlier start finished it.
    """

    stage: Stage
    make: Callable[[RunContext], None]
    needed: Callable[[RunContext], bool] = lambda run: True
    done: Callable[[RunContext], bool] = lambda run: False

    def is_due(self, run: RunContext) -> bool:
        """Whether the stage is still to be run."""
        return self.needed(run) and not self.done(run)

    def __call__(self, run: RunContext) -> None:
        if self.is_due(run):
            run.begin(self.stage)
            with run.clock(self.stage):
                self.make(run)


def earlier_scores(run: RunContext) -> dict[str, float]:
    """Scores that an earlier start of the run left."""
    if not run.directory.metrics.exists():
        return {}
    return known_scores(run.directory.read_json(run.directory.metrics))


RELEASE = (
    # what is there of the data set is found and kept shard by shard
    Step(stage=Stage.SYNTHESIS, make=synthesis, needed=lambda run: not evolves(run)),
    Step(stage=Stage.PICTURES, make=pictures),
    Step(
        stage=Stage.EVALUATION,
        make=evaluation,
        needed=lambda run: run.config.evaluation.enabled and not is_secret(run),
    ),
)
"""The stages that follow from what was released; they can be repeated when a run is over."""


# What they read, and what they leave --------------------------------------------------------------


def splits_to_read(config: RunConfig, *, learns: bool, known: Iterable[str] = ()) -> list[Split]:
    """Splits of the sensitive images that a start of a run reads.

    Args:
        config: The whole experiment.
        learns: Whether a stage that learns from the training images is still to be run.
        known: Names of the scores that an earlier start left.
    """
    reads = read_for(config.evaluation, known)
    reference = {config.evaluation.fid_reference} if REFERENCE in reads else set()
    splits: list[Split] = []
    if learns or TRAIN in reads or "train" in reference:
        splits.append("train")
    if TEST in reads or "test" in reference:
        splits.append("test")
    return splits


def inspect(run: RunContext, splits: list[Split], *, on_note: Note | None = None) -> None:
    """Looks for records that cannot be read before any budget is spent.

    Raises:
        DataError: There is one, and ``data.on_error`` is ``stop``.
    """
    found = run.source.inspect(splits)
    if on_note is not None:
        for line in run.source.notes():
            on_note(line, False)
        for line in found.report():
            on_note(line, True)
    if run.config.data.on_error == "stop":
        found.stop()
        return
    earlier = skipped_records(run)
    counts = {split: len(faults) for split, faults in found.faults.items()}
    write_json(run.directory.skipped, {**earlier, **counts})


def skipped_records(run: RunContext) -> dict[str, int]:
    """Number of records that could not be read, by split, for the privacy card."""
    path = run.directory.skipped
    return run.directory.read_json(path) if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves behind, for the caller's table.

    Attributes:
        directory: Where it lies.
        plan: The privacy plan.
        metrics: Content of ``metrics.json``.
        tracking_uri: The MLflow store, None where there is none.
        verdict: What the results may be called.
        manifest: SHA-256 of ``manifest.json``, which lists all files; empty before it is written.
    """

    directory: RunDirectory
    plan: PrivacyPlan
    metrics: dict[str, Any]
    tracking_uri: str | None
    verdict: Verdict
    manifest: str = ""


def summary(run: RunContext) -> dict[str, Any]:
    """Content of ``metrics.json``."""
    return {
        **earlier_scores(run),
        **run.scores,
        "epsilon_spent": _finite(run.spent),
        "epsilon_planned": _finite(run.plan.epsilon if run.plan.reads_images else 0.0),
        "delta": run.plan.delta,
        "release": run.verdict.answer,
        "seconds": run.clock.seconds,
        "orchestration": run.clock.cost(),
        **{key: values for key, values in run.clock.memory.items() if values},
    }


def _finite(epsilon: float) -> float | str:
    """JSON has no infinity."""
    return epsilon if epsilon < float("inf") else "inf"
