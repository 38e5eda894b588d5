"""The stages of a run, each a function of its :class:`~sapf_ray.runs.context.RunContext`.

:mod:`sapf_ray.pipeline` puts them in order and says when each is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray.config import RunConfig, config_hash
from sapf_ray.data.base import Split
from sapf_ray.evaluation.inputs import REFERENCE, TEST, TRAIN
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import known_scores, read_for
from sapf_ray.evolution.dataset import is_written, write_data_set
from sapf_ray.evolution.evolve import Evolution, make_parts
from sapf_ray.files import write_json
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.grounding import stage as grounding_stage
from sapf_ray.grounding.head_stage import labelling
from sapf_ray.latents import LatentCache, build_latent_cache, with_prompts
from sapf_ray.pictures import save_sample_grid
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs.context import RunContext
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.saliency.shared import shared_selection
from sapf_ray.stages import Stage
from sapf_ray.synthesis.launcher import synthesize

Note = Callable[[str, bool], None]  # a line about the data; whether it is for the terminal only

# The stages -------------------------------------------------------------------------------------


def plan(run: RunContext) -> None:
    """Writes the plan and begins the ledger: before any sensitive image is read."""
    _ = run.ledger, run.meter  # begun now
    if not run.directory.public.exists():
        public = {
            "data": run.source.name,
            "class_names": run.source.class_names,
            "prompts": run.source.prompts,
            "model": run.model.content_hash,
        }
        write_json(run.directory.public, public)
    run.tracker.log_plan(run.plan)


def latents(run: RunContext) -> None:
    """Encodes the sensitive images with the public VAE, once."""
    saliency = run.config.saliency
    build_latent_cache(
        run.latents,
        run.source,
        model=run.config.model,
        shard_size=saliency.shard_size,
        cpus=saliency.cpus_per_task,
        gpus=saliency.gpus_per_task,
        features=run.features,
        on_progress=run.report(Stage.LATENTS),
    )


def grounding(run: RunContext) -> None:
    """What remedies find out for classes whose words the public model does not know."""
    grounding_stage.ground(run)


def encoded(run: RunContext) -> LatentCache:
    """The encoded images, under the prompts that their classes have now."""
    cache = LatentCache(str(run.latents))
    if run.prompts == run.source.prompts:
        return cache
    saliency = run.config.saliency
    return with_prompts(
        cache,
        run.prompts,
        model=run.config.model,
        cpus=saliency.cpus_per_task,
        gpus=saliency.gpus_per_task,
    )


def selection(run: RunContext) -> None:
    """Selects the matrices to train, under DP: one release, or one that several runs share."""

    def make(releaser: Releaser) -> Selection:
        return select(
            run.model,
            encoded(run),
            config=run.config.saliency,
            releaser=releaser,
            seed=run.config.seed,
            on_progress=run.report(Stage.SELECTION),
        )

    root = run.config.cluster.selection_dir
    if run.plan.vote is not None:
        root = None  # another run's vote gave its classes other prompts
    if root is None or run.plan.selection is None or run.releaser.has_paid(Stage.SELECTION):
        selected = make(run.releaser)
    else:
        selected = shared_selection(
            Path(root), run.config, data=run.data_fingerprint, releaser=run.releaser, make=make
        )
    write_json(run.directory.selection, selected.to_dict())


def fine_tuning(run: RunContext) -> None:
    """Trains the adapter of the selected matrices by DP-SGD."""
    job = FinetuneJob(
        model=run.config.model,
        matrices=run.directory.read_json(run.directory.selection)["matrices"],
        cache=encoded(run),
        plan=run.plan,
        config=run.config.finetune,
        key=run.key,
        ledger=str(run.directory.ledger.resolve()),
        seed=run.config.seed,
        class_names=run.source.class_names,
        class_tokens="tokens" in run.plan.remedies,
        token_weight=run.config.grounding.token_weight,
        token_learning_rate=run.config.grounding.token_learning_rate,
    )
    finetune(
        job,
        run.checkpoints,
        adapter_dir=run.directory.adapter,
        on_progress=run.report(Stage.FINETUNE),
    )


def evolution(run: RunContext) -> None:
    """Private Evolution in place of training: reads sensitive images, writes the data set."""
    config = run.config
    source = run.source
    evolution = Evolution(
        parts=make_parts(
            config.evolution, config.synthesis, model=config.model, prompts=source.prompts
        ),
        source=source,
        resolution=run.model.resolution,
        config=config.evolution,
        sampling=config.synthesis,
        releaser=run.releaser,
        directory=run.directory.generations,
        private_directory=run.directory.private / "records",
        seed=config.seed,
    )
    last = evolution.run(run.report(Stage.EVOLUTION))
    write_data_set(
        last,
        run.directory.synthetic,
        class_names=source.class_names,
        prompts=source.prompts,
        spec=config_hash(config),
        privacy_note=run.privacy_note,
        seed=config.seed,
        shard_size=config.synthesis.shard_size,
    )


def synthesis(run: RunContext) -> None:
    """Samples the synthetic data set from the public model and the adapter."""
    made = synthesize(
        run.directory.synthetic,
        run.model,
        adapter_dir=run.directory.adapter if trains(run) else None,
        class_names=run.source.class_names,
        prompts=run.prompts,
        config=run.config.synthesis,
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
    save_sample_grid(
        run.directory.synthetic, run.source.class_names, path=run.directory.sample_grid
    )


def evaluation(run: RunContext) -> None:
    """Scores the data set against real images: a non-private measurement of research runs."""
    scores = evaluate_on_cluster(
        run.directory.synthetic,
        run.source,
        resolution=run.model.resolution,
        config=run.config.evaluation,
        seed=run.config.seed,
        known=earlier_scores(run),
    )
    run.scores.update(scores)


# Which stages a run needs, and which of them an earlier start has finished -----------------------


def trains(run: RunContext) -> bool:
    """Whether an adapter is trained."""
    return run.plan.finetune is not None


def evolves(run: RunContext) -> bool:
    """Whether images evolve instead."""
    return run.plan.evolution is not None


def is_trained(run: RunContext) -> bool:
    """Whether the adapter is there; latents and selection are then not needed any more."""
    return run.directory.adapter.exists()


def encodes(run: RunContext) -> bool:
    """Whether the latents of the images are needed."""
    return trains(run) or grounding_stage.is_needed(run)


def is_encoded(run: RunContext) -> bool:
    """Whether the stages that read latents are over; then they are not needed any more."""
    if trains(run):
        return is_trained(run)
    return grounding_stage.is_done(run)


def is_grounded(run: RunContext) -> bool:
    """Whether the remedies are done."""
    return is_trained(run) or grounding_stage.is_done(run)


def is_selected(run: RunContext) -> bool:
    """Whether the selection is there."""
    return is_trained(run) or run.directory.selection.exists()


def is_evolved(run: RunContext) -> bool:
    """Whether the evolved data set is there, whole."""
    return is_written(
        run.directory.synthetic,
        run.config.synthesis.n_images,
        n_classes=len(run.source.class_names),
        spec=config_hash(run.config),
        seed=run.config.seed,
        shard_size=run.config.synthesis.shard_size,
    )


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
        needed=lambda run: run.config.evaluation.enabled,
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
        verdict: What the results may be called, where it was not the run itself that made them.
    """

    directory: RunDirectory
    plan: PrivacyPlan
    metrics: dict[str, Any]
    tracking_uri: str | None
    verdict: str = ""


def summary(run: RunContext) -> dict[str, Any]:
    """Content of ``metrics.json``."""
    return {
        **earlier_scores(run),
        **run.scores,
        "epsilon_spent": _finite(run.spent),
        "epsilon_planned": _finite(run.plan.epsilon if run.plan.reads_images else 0.0),
        "delta": run.plan.delta,
        "seconds": run.clock.seconds,
        "orchestration": run.clock.cost(),
        **{key: values for key, values in run.clock.memory.items() if values},
    }


def _finite(epsilon: float) -> float | str:
    """JSON has no infinity."""
    return epsilon if epsilon < float("inf") else "inf"
