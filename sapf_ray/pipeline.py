"""The main job, stage by stage; the only file that knows them all.

plan -> latents -> selection -> fine-tuning -> synthesis -> evaluation -> card and tracking; or,
without training, plan -> evolution -> evaluation -> card and tracking. Each stage whose artifact is
already in the run directory is skipped, so the same command continues an interrupted run.
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
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import from_real_images, known_scores
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.evolution import check_evolution, is_written, make_parts, write_data_set
from sapf_ray.evolution.evolve import evolve
from sapf_ray.files import write_atomic
from sapf_ray.finetune.adapter import add_adapter
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.latents import build_latent_cache, shared_directory
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_model import PublicModel
from sapf_ray.pictures import save_sample_grid
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.runs import runlog
from sapf_ray.runs.clock import Stages, noise_of, open_ledger, privacy_note
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.gauges import Meter
from sapf_ray.runs.storage import Storage
from sapf_ray.runs.tracking import Tracker
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.saliency.shared import has_own, shared_selection
from sapf_ray.synthesis.launcher import synthesize

Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class Result:
    """What a run leaves behind, for the caller's table."""

    directory: RunDirectory
    plan: PrivacyPlan
    metrics: dict[str, Any]
    tracking_uri: str | None


def run(
    config: RunConfig, out: str, on_progress: Progress | None = None, since: float | None = None
) -> Result:
    """Runs or continues one experiment in directory ``out``.

    Args:
        config: The whole experiment.
        out: Run directory; created, or one that an earlier start of the same config left.
        on_progress: Called with (stage, done, total).
        since: ``time.time()`` from which on time counts as the run's, now unless given; see
            :meth:`Stages.cost`.

    Raises:
        SapfError: Any of its subclasses, with one line that says what to change. Everything that
            can be checked without the sensitive images is checked before the first is read.
    """

    since = time.time() if since is None else since
    # Checks: nothing sensitive is read, nothing is spent.
    model = PublicModel.open(config.model)
    model_path = model.path
    source = open_source(config.data)
    plan = make_plan(config, source.n_train)
    model.check_classes(source.prompts)
    if plan.finetune is not None:
        pool = model.pool(config.saliency.pool)
        if (
            config.finetune.adapter != "lora" or config.saliency.pool == "all"
        ):  # not every layer can be trained
            add_adapter(
                denoiser_of(load_pipeline(model_path)),
                list(pool),
                config=config.finetune,
                seed=config.seed,
            )
    if plan.evolution is not None:
        check_evolution(config.evolution, config.synthesis, source=source, stage=plan.evolution)
        make_parts(config.evolution, config.synthesis, model=config.model, prompts=source.prompts)
    check_evaluation(config.evaluation)
    directory = RunDirectory(out)
    resumed = directory.claim(config)
    if config.cluster.storage:
        Storage(config.cluster.storage, directory)  # says now what it would say at the end
    tracker = Tracker.open(config, directory)
    try:
        with runlog.start_of_run(
            runlog.Place(path=str(directory.log.resolve()), run=directory.run_id()), resumed
        ):
            stage = Stages(run=directory, since=since)
            with cluster.session(config.cluster):
                cluster.check(config)
                cluster.check_shared(directory.root)
                source.verify()
                meter = Meter(directory.root.name, plan.epsilon)

                def report(stage: str) -> Callable[[int, int], None]:
                    def show(done: int, total: int) -> None:
                        meter.progress(stage, done, total)
                        if on_progress:
                            on_progress(stage, done, total)

                    return show

                result = _stages(
                    config,
                    directory,
                    plan=plan,
                    source=source,
                    model_path=model_path,
                    tracker=tracker,
                    meter=meter,
                    stage=stage,
                    report=report,
                )
            result.metrics["orchestration"] = (
                stage.cost()
            )  # now with what came after the last stage
            directory.write_json(directory.metrics, result.metrics)
            runlog.event(
                "run_ended",
                seconds=round(time.time() - since, 2),
                orchestration=result.metrics["orchestration"]["total_share"],
            )
            return result
    except BaseException as error:
        tracker.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        directory.release()


def _stages(
    config: RunConfig,
    directory: RunDirectory,
    *,
    plan: PrivacyPlan,
    source: ImageSource,
    model_path: str,
    tracker: Tracker,
    meter: Meter,
    stage: Stages,
    report: Callable[[str], Callable[[int, int], None]],
) -> Result:
    with stage("plan"):
        ledger = open_ledger(directory, plan)
        tracker.log_plan(plan)
    idle_share = None
    if plan.finetune is not None and not directory.adapter.exists():
        _learn(
            config, directory, plan=plan, source=source, ledger=ledger, stage=stage, report=report
        )
        tracker.log_spend(ledger)
    elif plan.evolution is not None:
        if not _is_evolved(config, directory, source=source):
            with stage("evolution"):
                _evolve(config, directory, plan=plan, source=source, ledger=ledger, report=report)
            tracker.log_spend(ledger)
        shutil.rmtree(
            directory.generations, ignore_errors=True
        )  # the last generation is the data set
    if not directory.selection.exists():
        directory.write_json(
            directory.selection,
            Selection(matrices=[], scores={}, score="none", pool_size=0, event=None).to_dict(),
        )
    if not config.cluster.keep_cache:
        directory.delete_private()
    spent = ledger.epsilon_spent()
    meter.spent(spent)
    if plan.evolution is None:
        with stage("synthesis"):
            adapter = directory.adapter if plan.finetune is not None else None
            idle_share = synthesize(
                directory.synthetic,
                config.model,
                adapter_dir=adapter,
                class_names=source.class_names,
                prompts=source.prompts,
                config=config.synthesis,
                seed=config.seed,
                privacy_note=privacy_note(plan, spent),
                on_progress=report("synthesis"),
            ).idle_share
    with stage("pictures"):
        grid = save_sample_grid(
            directory.synthetic, source.class_names, path=directory.plots / "synthetic.png"
        )
    scores: dict[str, float] = {}
    if directory.metrics.exists():
        scores = known_scores(directory.read_json(directory.metrics))
    if config.evaluation.enabled:
        with stage("evaluation"):
            resolution = PublicModel.open(config.model).resolution
            scores = _evaluate(
                config, directory, source=source, resolution=resolution, known=scores
            )
    if idle_share is not None:
        scores["synthesis_idle_share"] = round(idle_share, 4)
    metrics = {
        **scores,
        "epsilon_spent": _finite(spent),
        "epsilon_planned": _finite(plan.epsilon if plan.reads_images else 0.0),
        "delta": plan.delta,
        "seconds": stage.seconds,
        "orchestration": stage.cost(),
        **{key: values for key, values in stage.memory.items() if values},
    }
    directory.write_json(directory.metrics, metrics)
    write_atomic(
        directory.card,
        privacy_card(
            plan,
            ledger,
            config,
            model_name=config.model.path,
            data_name=source.name,
            scores=from_real_images(metrics),
            shared_selection=directory.read_json(directory.selection).get("shared", False),
        ),
    )
    if config.cluster.storage:
        Storage(config.cluster.storage, directory).publish()
    tracker.finish(
        directory, plan, metrics=metrics, grid=grid, not_private=from_real_images(metrics)
    )
    return Result(directory=directory, plan=plan, metrics=metrics, tracking_uri=tracker.uri)


def _finite(epsilon: float) -> float | str:
    return epsilon if epsilon < float("inf") else "inf"  # JSON has no infinity


def _learn(
    config: RunConfig,
    directory: RunDirectory,
    *,
    plan: PrivacyPlan,
    source: ImageSource,
    ledger: Ledger,
    stage: Stages,
    report: Callable[[str], Callable[[int, int], None]],
) -> None:
    """The stages that read sensitive images to train: latents, selection, fine-tuning."""
    key, stream = noise_of(config, directory, plan=plan, source=source, ledger=ledger)
    device = pick_device(config.saliency.gpus_per_task)
    with stage("latents"):
        latents, shared = directory.latents, config.cluster.latents_dir
        if shared is not None:
            latents = shared_directory(Path(shared), source, model=config.model)
        cache = build_latent_cache(
            latents,
            source,
            model=config.model,
            device=device,
            shard_size=config.saliency.shard_size,
            resources={
                "num_cpus": config.saliency.cpus_per_task,
                "num_gpus": config.saliency.gpus_per_task,
            },
            on_progress=report("latents"),
        )
    if not directory.selection.exists():
        with stage("selection"):

            def release(key: NoiseKey, stream: str) -> Selection:
                return select(
                    config.model,
                    cache,
                    plan,
                    config.saliency,
                    key,
                    stream,
                    ledger,
                    report("selection"),
                    config.seed,
                )

            root = config.cluster.selection_dir
            if root is None or plan.selection is None or has_own(ledger, stream):
                selection = release(key, stream)
            else:
                selection = shared_selection(
                    Path(root),
                    config,
                    plan,
                    directory.data_fingerprint.read_text(),
                    ledger,
                    release,
                )
            directory.write_json(directory.selection, selection.to_dict())
    selected = directory.read_json(directory.selection)
    with stage("finetune"):
        job = FinetuneJob(
            model=config.model,
            matrices=selected["matrices"],
            cache=cache,
            plan=plan,
            config=config.finetune,
            key=key,
            stream=stream,
            ledger=str(directory.ledger.resolve()),
            seed=config.seed,
        )
        place = (
            Storage(config.cluster.storage, directory).checkpoints
            if config.cluster.storage
            else directory.checkpoints
        )
        finetune(job, place, directory.adapter, report("finetune"))


def _is_evolved(config: RunConfig, directory: RunDirectory, *, source: ImageSource) -> bool:
    synthesis, classes = config.synthesis, len(source.class_names)
    return is_written(
        directory.synthetic,
        synthesis.n_images,
        n_classes=classes,
        spec=config_hash(config),
        seed=config.seed,
        shard_size=synthesis.shard_size,
    )


def _evolve(
    config: RunConfig,
    directory: RunDirectory,
    *,
    plan: PrivacyPlan,
    source: ImageSource,
    ledger: Ledger,
    report: Callable[[str], Callable[[int, int], None]],
) -> None:
    """The one stage of Private Evolution: reads sensitive images and writes the synthetic data set."""
    assert plan.evolution is not None
    key, stream = noise_of(config, directory, plan=plan, source=source, ledger=ledger)
    last = evolve(
        make_parts(config.evolution, config.synthesis, model=config.model, prompts=source.prompts),
        source,
        resolution=PublicModel.open(config.model).resolution,
        config=config.evolution,
        sampling=config.synthesis,
        stage=plan.evolution,
        key=key,
        stream=stream,
        ledger=ledger,
        directory=directory.generations,
        private_directory=directory.private / "records",
        seed=config.seed,
        on_progress=report("evolution"),
        non_private=plan.non_private,
    )
    write_data_set(
        last,
        directory.synthetic,
        class_names=source.class_names,
        prompts=source.prompts,
        spec=config_hash(config),
        privacy_note=privacy_note(plan, ledger.epsilon_spent()),
        seed=config.seed,
        shard_size=config.synthesis.shard_size,
    )


def _evaluate(
    config: RunConfig,
    directory: RunDirectory,
    *,
    source: ImageSource,
    resolution: int,
    known: dict[str, float],
) -> dict[str, float]:
    return evaluate_on_cluster(
        directory.synthetic,
        source,
        resolution=resolution,
        config=config.evaluation,
        seed=config.seed,
        known=known,
    )
