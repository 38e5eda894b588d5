"""The main job, stage by stage; the only file that knows them all.

It reads like the paper's Algorithm 2: plan -> latents -> (grounding ->) selection -> fine-tuning ->
synthesis -> evaluation -> privacy card; or, without training, plan -> evolution -> evaluation ->
privacy card. A stage whose result is already in the run directory is skipped, so the same command
continues an interrupted run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

from sapf_ray import cluster, placement
from sapf_ray.afterwards import (
    RELEASE,
    Note,
    Result,
    Step,
    earlier_scores,
    evolves,
    inspect,
    skipped_records,
    splits_to_read,
    summary,
    trains,
)
from sapf_ray.config import RunConfig
from sapf_ray.config.section import require
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.data.canary_images import CanaryImages
from sapf_ray.data.held_out import WithoutHeldOut
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.metrics import from_real_images
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.evolution.evolve import check_evolution, make_parts
from sapf_ray.files import write_atomic, write_json
from sapf_ray.finetune.adapter import check_adapter
from sapf_ray.grounding import stage as grounding_stage
from sapf_ray.grounding.candidates import check_vote
from sapf_ray.grounding.head_stage import check_head
from sapf_ray.grounding.proportions import check_proportions
from sapf_ray.models.facts import find_facts
from sapf_ray.models.feature_table import record_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.card import card_json, privacy_card
from sapf_ray.privacy.card_gather import gather
from sapf_ray.privacy.card_registry import is_registrable, registry_yaml
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.runs import runlog
from sapf_ray.runs.context import Progress, RunContext, open_run
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.manifest import write_manifest
from sapf_ray.saliency.selection import Selection
from sapf_ray.shared_directory import check_shared
from sapf_ray.stages import Stage
from sapf_ray.steps import (
    encodes,
    evolution,
    fine_tuning,
    grounding,
    is_encoded,
    is_evolved,
    is_grounded,
    is_scored,
    is_selected,
    is_trained,
    is_trial,
    latents,
    plan,
    score,
    selection,
)


def run(
    config: RunConfig,
    out: str,
    *,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
    on_plan: Callable[[PrivacyPlan, ImageSource, PublicModel], None] | None = None,
    since: float | None = None,
) -> Result:
    """Runs or continues one experiment in directory ``out``.

    ``sapf run`` asks :mod:`sapf_ray.reuse` first: of a finished run whose synthesis or evaluation
    alone is to be another, that makes these, in a folder of their own.

    Args:
        config: The whole experiment.
        out: Run directory; created, or one that an earlier start of the same config left.
        on_progress: Called with (stage, done, total); total is 0 where it is not known.
        on_note: Called with each line about the data, and whether it is for the terminal only.
        on_plan: Called with the plan, the listed images and the model, before anything is read or
            written.
        since: ``time.time()`` from which on time counts as the run's, now unless given; see
            :meth:`sapf_ray.runs.clock.Clock.cost`.

    Raises:
        SapfError: Any of its subclasses, with one line that says what to change. Everything that
            can be checked without the sensitive images is checked before the first is read.
    """
    began = time.time() if since is None else since
    source = with_canaries(open_source(config.data), config.audit.images, out)
    model = PublicModel.open(config.model)
    found = find_facts(config, source, model=model)
    plan = make_plan(config, source.n_units, facts=found.facts)
    source = without_held_out(source, plan, config=config)
    check(config, source=source, model=model, plan=plan)
    if on_plan is not None:
        on_plan(plan, source, model)
    warning = found.words.line(plan.remedies)
    if warning is not None and on_note is not None:
        on_note(warning, False)
    with open_run(
        config,
        out,
        source=source,
        model=model,
        plan=plan,
        on_progress=on_progress,
        since=began,
    ) as context:
        if warning is not None:
            chosen = ", ".join(plan.remedies) or "none"
            runlog.event("words_unknown", runlog.WARNING, remedies=chosen)
        with cluster.session(config.cluster, spills=context.directory.spilled):
            context = replace(context, config=place(config, model, on_note=on_note))
            check_precision(context.config, plan)
            cluster.check(context.config)
            check_shared(context.directory.root)
            result = algorithm(context, on_note)
        # once more, with what came after the last stage
        result.metrics["orchestration"] = context.clock.cost()
        write_json(context.directory.metrics, result.metrics)
        runlog.event(
            "run_ended",
            seconds=round(time.time() - began, 2),
            orchestration=result.metrics["orchestration"]["total_share"],
        )
        result = replace(result, manifest=write_manifest(context.directory))
        context.tracker.seal(result.manifest)
    return result


def with_canaries(source: ImageSource, images: int, out: str) -> ImageSource:
    """The source, with crafted images behind its own in a run that is audited with them."""
    if images == 0:
        return source
    return CanaryImages(source, count=images, coins=RunDirectory(out).canary_coins.resolve())


def without_held_out(source: ImageSource, plan: PrivacyPlan, *, config: RunConfig) -> ImageSource:
    """The source, in a trial of a private choice without the images that score it.

    Raises:
        ConfigError: Nobody has drawn which: the run is none of a choice.
    """
    if plan.repeat is None:
        return source
    split = config.tuning.split
    if split is None:
        raise ConfigError(
            "tuning.private",
            config.tuning.private,
            "is set by `sapf tune --private`, which draws the number of such runs",
        )
    return WithoutHeldOut(source, held_out=plan.repeat.held_out, split=Path(split))


def check(config: RunConfig, *, source: ImageSource, model: PublicModel, plan: PrivacyPlan) -> None:
    """Finds what would stop a run; reads nothing sensitive and spends nothing.

    Raises:
        SapfError: In one line, naming the field.
    """
    model.check_classes(source.prompts)
    expected = placement.expected_gpus(config)
    check_precision(placement.placed(config, expected, model_gb=0.0), plan)
    model.check_resolution(config.synthesis.resolution, "synthesis.resolution")
    if plan.vote is not None:
        check_vote(config, source.prompts, model=model)
    check_head(plan, len(source.class_names))
    check_proportions(config, plan)
    record_features(config, plan)
    if plan.finetune is not None:
        matrices = list(model.pool(config.saliency.pool))
        check_adapter(model.denoiser, matrices, adapter=config.finetune.adapter)
    if plan.evolution is not None:
        check_evolution(config.evolution, config.synthesis, source=source, stage=plan.evolution)
        make_parts(config.evolution, config.synthesis, model=config.model, prompts=source.prompts)
    require(
        config.evaluation.test_images == "split",
        "evaluation.test_images",
        config.evaluation.test_images,
        "must be split in a run, whose training images are no test; see `sapf evaluate`",
    )
    config.synthesis.check_classes(len(source.class_names))
    check_evaluation(config.evaluation, made=config.synthesis.side(model.resolution))


def place(config: RunConfig, model: PublicModel, *, on_note: Note | None) -> RunConfig:
    """The config with numbers for every ``auto``, told to the user; Ray must be up."""
    gpus = placement.cluster_gpus()
    config = placement.placed(config, gpus, model_gb=model.sampling_gb)
    lines = [f"placement: {placement.words(config)}", placement.idle_gpus(config, gpus)]
    for line in filter(None, lines):
        if on_note is not None:
            on_note(line, False)
    return config


def check_precision(config: RunConfig, plan: PrivacyPlan) -> None:
    """float16 needs a GPU wherever the model computes.

    Raises:
        ConfigError: A stage of this run has none.
    """
    stages = {
        "saliency.gpus_per_task": plan.encodes,
        "finetune.gpus_per_worker": plan.finetune is not None,
        "evolution.gpus_per_task": plan.evolution is not None,
        "synthesis.gpus_per_actor": plan.evolution is None,
    }
    gpus = placement.gpu_settings(config)
    without = [key for key, needed in stages.items() if needed and not gpus[key]]
    require(
        config.model.dtype != "float16" or not without,
        "model.dtype",
        config.model.dtype,
        f"needs GPUs, and {', '.join(without)} is 0; on CPUs use bfloat16 or float32",
    )


def algorithm(run: RunContext, on_note: Note | None = None) -> Result:
    """All stages, in the paper's order; faults of what they will read stop a run before its ledger
    is begun.
    """
    learned = [step for step in LEARN if step.is_due(run)]
    splits = splits_to_read(run.config, learns=bool(learned), known=earlier_scores(run))
    inspect(run, splits, on_note=on_note)
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


PLAN = Step(stage=Stage.PLAN, make=plan)

LEARN = (
    Step(stage=Stage.LATENTS, make=latents, needed=encodes, done=is_encoded),
    Step(
        stage=Stage.GROUNDING,
        make=grounding,
        needed=grounding_stage.is_needed,
        done=is_grounded,
    ),
    Step(stage=Stage.SELECTION, make=selection, needed=trains, done=is_selected),
    Step(stage=Stage.FINETUNE, make=fine_tuning, needed=trains, done=is_trained),
    Step(stage=Stage.EVOLUTION, make=evolution, needed=evolves, done=is_evolved),
    Step(stage=Stage.SCORE, make=score, needed=is_trial, done=is_scored),
)
"""The stages that read sensitive images, each under the plan."""


# Between and after the stages --------------------------------------------------------------------


def forget(run: RunContext) -> None:
    """Deletes what is sensitive or no longer needed, once nothing more is released."""
    directory = run.directory
    shutil.rmtree(directory.generations, ignore_errors=True)  # the last one is the data set
    if not directory.selection.exists():
        write_json(directory.selection, Selection.none().to_dict())
    directory.delete_key()
    if not run.config.cluster.keep_cache:
        directory.delete_private()
    run.meter.spent(run.spent)


def conclude(run: RunContext) -> Result:
    """Writes scores, costs and the privacy card, and publishes the results."""
    directory = run.directory
    metrics = summary(run)
    write_json(directory.metrics, metrics)
    facts = gather(
        run.plan,
        run.ledger,
        run.config,
        model_name=run.config.model.path,
        data_name=run.source.name,
        scores=from_real_images(metrics),
        shared_selection=directory.read_json(directory.selection).get("shared", False),
        skipped=skipped_records(run),
        grounding=grounding_stage.found(run),
    )
    write_atomic(directory.card_json, card_json(facts))
    write_atomic(directory.card, privacy_card(facts))
    if is_registrable(facts):
        write_atomic(directory.registry, registry_yaml(facts, published=date.today()))
    run.publish()
    run.tracker.finish(
        directory,
        run.plan,
        run.verdict,
        metrics=metrics,
        grid=directory.sample_grid,
        not_private=from_real_images(metrics),
    )
    return Result(
        directory=directory,
        plan=run.plan,
        metrics=metrics,
        tracking_uri=run.tracker.uri,
        verdict=run.verdict,
    )
