"""The main job, stage by stage; the only file that knows them all.

It reads like the paper's Algorithm 2: plan -> latents -> selection -> fine-tuning -> synthesis ->
evaluation -> privacy card; or, without training, plan -> evolution -> evaluation -> privacy card.
A stage whose result is already in the run directory is skipped, so the same command continues an
interrupted run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray import cluster
from sapf_ray.config import RunConfig, config_hash
from sapf_ray.data.base import ImageSource, Split, open_source
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import from_real_images, known_scores
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.evolution.dataset import is_written, write_data_set
from sapf_ray.evolution.evolve import Evolution, check_evolution, make_parts
from sapf_ray.files import write_atomic, write_json
from sapf_ray.finetune.adapter import check_adapter
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.latents import LatentCache, build_latent_cache
from sapf_ray.models.public_model import PublicModel
from sapf_ray.pictures import save_sample_grid
from sapf_ray.privacy.card import privacy_card, privacy_note
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs import runlog
from sapf_ray.runs.context import Progress, RunContext, open_run
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.saliency.shared import shared_selection
from sapf_ray.stages import Stage
from sapf_ray.synthesis.launcher import synthesize

Note = Callable[[str, bool], None]  # a line about the data; whether it is for the terminal only

SKIPPED_FILE = "skipped.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves behind, for the caller's table."""

    directory: RunDirectory
    plan: PrivacyPlan
    metrics: dict[str, Any]
    tracking_uri: str | None


def run(
    config: RunConfig,
    out: str,
    *,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
    since: float | None = None,
) -> Result:
    """Runs or continues one experiment in directory ``out``.

    Args:
        config: The whole experiment.
        out: Run directory; created, or one that an earlier start of the same config left.
        on_progress: Called with (stage, done, total).
        on_note: Called with each line about the data, and whether it is for the terminal only.
        since: ``time.time()`` from which on time counts as the run's, now unless given; see
            :meth:`sapf_ray.runs.clock.Clock.cost`.

    Raises:
        SapfError: Any of its subclasses, with one line that says what to change. Everything that
            can be checked without the sensitive images is checked before the first is read.
    """
    began = time.time() if since is None else since
    source = open_source(config.data)
    plan = make_plan(config, source.n_train)
    model = PublicModel.open(config.model)
    check(config, source=source, model=model, plan=plan)
    with open_run(
        config,
        out,
        source=source,
        model=model,
        plan=plan,
        on_progress=on_progress,
        since=began,
    ) as context:
        with cluster.session(config.cluster):
            cluster.check(config)
            cluster.check_shared(context.directory.root)
            result = algorithm(context, on_note)
        # once more, with what came after the last stage
        result.metrics["orchestration"] = context.clock.cost()
        write_json(context.directory.metrics, result.metrics)
        runlog.event(
            "run_ended",
            seconds=round(time.time() - began, 2),
            orchestration=result.metrics["orchestration"]["total_share"],
        )
    return result


def check(config: RunConfig, *, source: ImageSource, model: PublicModel, plan: PrivacyPlan) -> None:
    """Finds what would stop a run; reads nothing sensitive and spends nothing.

    Raises:
        SapfError: In one line, naming the field.
    """
    model.check_classes(source.prompts)
    if plan.finetune is not None:
        matrices = list(model.pool(config.saliency.pool))
        check_adapter(model.denoiser, matrices, adapter=config.finetune.adapter)
    if plan.evolution is not None:
        check_evolution(config.evolution, config.synthesis, source=source, stage=plan.evolution)
        make_parts(config.evolution, config.synthesis, model=config.model, prompts=source.prompts)
    check_evaluation(config.evaluation)


def algorithm(run: RunContext, on_note: Note | None = None) -> Result:
    """All stages, in the paper's order; faults of what they will read stop a run before its ledger
    is begun.
    """
    learned = [step for step in LEARN if step.is_due(run)]
    inspect(run, splits_to_read(run.config, learns=bool(learned)), on_note=on_note)
    PLAN(run)
    if learned:
        _ = run.releaser  # refuses a lost key or other images before any of them is read
        for step in learned:
            step(run)
        run.tracker.log_spend(run.ledger)
    forget(run)
    for step in RELEASE:
        step(run)
    return conclude(run)


def splits_to_read(config: RunConfig, *, learns: bool) -> list[Split]:
    """Splits of the sensitive images that a start of a run reads."""
    evaluation = config.evaluation
    splits: list[Split] = []
    if learns or (evaluation.enabled and evaluation.fid_reference == "train"):
        splits.append("train")
    if evaluation.enabled:
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
    write_json(run.directory.root / SKIPPED_FILE, {**earlier, **counts})


def skipped_records(run: RunContext) -> dict[str, int]:
    """Number of records that could not be read, by split, for the privacy card."""
    path = run.directory.root / SKIPPED_FILE
    return run.directory.read_json(path) if path.exists() else {}


# The stages -------------------------------------------------------------------------------------


def plan(run: RunContext) -> None:
    """Writes the plan and begins the ledger: before any sensitive image is read."""
    _ = run.ledger, run.meter  # begun now
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
        on_progress=run.report(Stage.LATENTS),
    )


def selection(run: RunContext) -> None:
    """Selects the matrices to train, under DP: one release, or one that several runs share."""

    def make(releaser: Releaser) -> Selection:
        return select(
            run.model,
            LatentCache(str(run.latents)),
            config=run.config.saliency,
            releaser=releaser,
            seed=run.config.seed,
            on_progress=run.report(Stage.SELECTION),
        )

    root = run.config.cluster.selection_dir
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
        cache=LatentCache(str(run.latents)),
        plan=run.plan,
        config=run.config.finetune,
        key=run.key,
        ledger=str(run.directory.ledger.resolve()),
        seed=run.config.seed,
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
        privacy_note=privacy_note(run.plan, run.spent),
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
        prompts=run.source.prompts,
        config=run.config.synthesis,
        seed=run.config.seed,
        privacy_note=privacy_note(run.plan, run.spent),
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
        known=_earlier_scores(run),
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
            with run.clock(self.stage):
                self.make(run)


PLAN = Step(stage=Stage.PLAN, make=plan)

LEARN = (
    Step(stage=Stage.LATENTS, make=latents, needed=trains, done=is_trained),
    Step(stage=Stage.SELECTION, make=selection, needed=trains, done=is_selected),
    Step(stage=Stage.FINETUNE, make=fine_tuning, needed=trains, done=is_trained),
    Step(stage=Stage.EVOLUTION, make=evolution, needed=evolves, done=is_evolved),
)
"""The stages that read sensitive images, each under the plan."""

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
"""The stages that follow from what was released."""


# Between and after the stages --------------------------------------------------------------------


def forget(run: RunContext) -> None:
    """Deletes what is sensitive or no longer needed, once nothing more is released."""
    directory = run.directory
    shutil.rmtree(directory.generations, ignore_errors=True)  # the last one is the data set
    if not directory.selection.exists():
        write_json(directory.selection, Selection.none().to_dict())
    if not run.config.cluster.keep_cache:
        directory.delete_private()
    run.meter.spent(run.spent)


def conclude(run: RunContext) -> Result:
    """Writes scores, costs and the privacy card, and publishes the results."""
    directory = run.directory
    metrics = {
        **_earlier_scores(run),
        **run.scores,
        "epsilon_spent": _finite(run.spent),
        "epsilon_planned": _finite(run.plan.epsilon if run.plan.reads_images else 0.0),
        "delta": run.plan.delta,
        "seconds": run.clock.seconds,
        "orchestration": run.clock.cost(),
        **{key: values for key, values in run.clock.memory.items() if values},
    }
    write_json(directory.metrics, metrics)
    card = privacy_card(
        run.plan,
        run.ledger,
        run.config,
        model_name=run.config.model.path,
        data_name=run.source.name,
        scores=from_real_images(metrics),
        shared_selection=directory.read_json(directory.selection).get("shared", False),
        skipped=skipped_records(run),
    )
    write_atomic(directory.card, card)
    if run.storage is not None:
        run.storage.publish()
    run.tracker.finish(
        directory,
        run.plan,
        metrics=metrics,
        grid=directory.sample_grid,
        not_private=from_real_images(metrics),
    )
    return Result(directory=directory, plan=run.plan, metrics=metrics, tracking_uri=run.tracker.uri)


def _earlier_scores(run: RunContext) -> dict[str, float]:
    """Scores that an earlier start of the run left."""
    if not run.directory.metrics.exists():
        return {}
    return known_scores(run.directory.read_json(run.directory.metrics))


def _finite(epsilon: float) -> float | str:
    """JSON has no infinity."""
    return epsilon if epsilon < float("inf") else "inf"
