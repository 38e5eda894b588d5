"""The stages of a run, each a function of its :class:`~sapf_ray.runs.context.RunContext`.

:mod:`sapf_ray.pipeline` puts them in order and says when each is due.
"""

from __future__ import annotations

from pathlib import Path

from sapf_ray.afterwards import synthesis, trains
from sapf_ray.config import config_hash
from sapf_ray.evaluation.held_out_score import score_trial
from sapf_ray.evolution.dataset import is_written, write_data_set
from sapf_ray.evolution.evolve import Evolution, make_parts
from sapf_ray.files import write_json
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.grounding import stage as grounding_stage
from sapf_ray.latents import LatentCache, build_latent_cache, with_prompts
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs.context import RunContext
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.saliency.shared import shared_selection
from sapf_ray.stages import Stage

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
        gpus=saliency.gpus,
        features=run.features,
        on_progress=run.report(Stage.LATENTS),
    )


def grounding(run: RunContext) -> None:
    """What remedies find out for classes whose words the public model does not know."""
    grounding_stage.ground(run)


def encoded(run: RunContext) -> LatentCache:
    """The encoded images, under the prompts that their classes have now."""
    cache = LatentCache(str(run.latents), units=run.units_file)
    if run.prompts == run.source.prompts:
        return cache
    saliency = run.config.saliency
    return with_prompts(
        cache,
        run.prompts,
        model=run.config.model,
        cpus=saliency.cpus_per_task,
        gpus=saliency.gpus,
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
    if run.plan.vote is not None or run.plan.canaries:
        root = None  # another run's vote gave its classes other prompts; no other run has canaries
    if root is None or run.plan.selection is None or run.releaser.has_paid(Stage.SELECTION):
        selected = make(run.releaser)
    else:
        selected = shared_selection(
            Path(root), run.config, data=run.records_fingerprint, releaser=run.releaser, make=make
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
        canaries=run.canaries,
        n_units=run.source.n_units,
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
        units=run.units_file,
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


def score(run: RunContext) -> None:
    """Scores a trial of a private choice by what its synthetic images teach; they are made now, for
    the score is a release as others.
    """
    synthesis(run)
    found = score_trial(run)
    run.directory.prepare_private()
    write_json(run.directory.score, {"noisy_correct": found}, mode=0o600)


# Which stages a run needs, and which of them an earlier start has finished -----------------------


def is_trained(run: RunContext) -> bool:
    """Whether the adapter is there; latents and selection are then not needed any more."""
    return run.directory.adapter.exists()


def encodes(run: RunContext) -> bool:
    """Whether the latents of the images are needed."""
    return run.plan.encodes


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


def is_trial(run: RunContext) -> bool:
    """Whether the run is a trial of a private choice, to be scored."""
    return run.plan.score is not None


def is_scored(run: RunContext) -> bool:
    """Whether its score is there; of a trial that was chosen it has gone with its secrets."""
    return run.directory.score.exists() or run.directory.metrics.exists()


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
