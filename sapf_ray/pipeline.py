"""The main job, stage by stage; the only file that knows them all.

plan -> latents -> selection -> fine-tuning -> synthesis -> evaluation -> card and tracking. Each stage whose
artifact is already in the run directory is skipped, so the same command continues an interrupted run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sapf_ray import cluster
from sapf_ray.config import RunConfig, config_hash
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.data.latents import build_latent_cache
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.finetune.adapter import add_adapter
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.models.loading import load_pipeline, native_resolution, pick_device, resolve_model
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.privacy.streams import NoiseKey
from sapf_ray.report.grid import save_sample_grid
from sapf_ray.rundir import RunDirectory, write_atomic
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.synthesis.launcher import synthesize
from sapf_ray.tracking import Tracker

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """What a run leaves behind, for the caller's table."""

    directory: RunDirectory
    plan: PrivacyPlan
    metrics: dict[str, Any]
    tracking_uri: str | None


@dataclass
class _Stages:
    """Times stages, and keeps earlier starts' times for stages that are skipped."""

    run: RunDirectory
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.run.timings.exists():
            self.seconds = self.run.read_json(self.run.timings)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        self.run.write_json(self.run.timings, self.seconds)


def run(config: RunConfig, out: str, on_progress: Progress | None = None) -> Result:
    """Runs or continues one experiment in directory ``out``.

    Args:
        config: The whole experiment.
        out: Run directory; created, or one that an earlier start of the same config left.
        on_progress: Called with (stage, done, total).

    Raises:
        SapfError: Any of its subclasses, with one line that says what to change. Everything that can be checked
            without the sensitive images is checked before the first is read.
    """

    def report(stage: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: on_progress(stage, done, total)) if on_progress else None

    # Checks: nothing sensitive is read, nothing is spent.
    model_path = resolve_model(config.model.path)
    source = open_source(config.data)
    plan = make_plan(config, source.n_train)
    if config.finetune.adapter != "lora" and plan.finetune is not None:
        denoiser = load_pipeline(model_path).unet
        add_adapter(denoiser, list(candidate_pool(denoiser, config.saliency.pool)), config.finetune, config.seed)
    check_evaluation(config.evaluation)
    directory = RunDirectory(out)
    directory.claim(config)
    tracker = Tracker.open(config, directory)
    try:
        with cluster.session(config.cluster):
            cluster.check(config)
            source.verify()
            return _stages(config, directory, plan, source, model_path, tracker, report)
    except BaseException as error:
        tracker.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        directory.release()


def _stages(
    config: RunConfig, directory: RunDirectory, plan: PrivacyPlan, source: ImageSource, model_path: str,
    tracker: Tracker, report: Callable[[str], Callable[[int, int], None] | None],
) -> Result:
    stage = _Stages(directory)
    with stage("plan"):
        ledger = _open_ledger(directory, plan)
        tracker.log_plan(plan)
    private = plan.finetune is not None
    if private and not directory.adapter.exists():
        _learn(config, directory, plan, source, ledger, stage, report)
        tracker.log_spend(ledger)
    elif not directory.selection.exists():
        directory.write_json(directory.selection, Selection([], {}, "none", 0, None).to_dict())
    if not config.cluster.keep_cache:
        directory.delete_private()
    spent = ledger.epsilon_spent()
    with stage("synthesis"):
        synthesis = synthesize(
            directory.synthetic, config.model, directory.adapter if private else None, source.class_names,
            source.prompts, config.synthesis, config.seed,
            _privacy_note(plan, spent), on_progress=report("synthesis"),
        )
    with stage("pictures"):
        grid = save_sample_grid(directory.synthetic, source.class_names, directory.plots / "synthetic.png")
    scores: dict[str, float] = {}
    if config.evaluation.enabled:
        with stage("evaluation"):
            resolution = native_resolution(load_pipeline(config.model.path))
            scores = _evaluate(config, directory, source, resolution)
    if synthesis.idle_share is not None:
        scores["synthesis_idle_share"] = round(synthesis.idle_share, 4)
    metrics = {
        **scores,
        "epsilon_spent": _finite(spent), "epsilon_planned": _finite(plan.epsilon if private else 0.0),
        "delta": plan.delta, "seconds": stage.seconds,
    }
    directory.write_json(directory.metrics, metrics)
    write_atomic(directory.card, privacy_card(plan, ledger, config, model_name=config.model.path, data_name=source.name))
    tracker.finish(directory, plan, metrics, grid)
    return Result(directory, plan, metrics, tracker.uri)


def _privacy_note(plan: PrivacyPlan, spent: float) -> str:
    """The data set card's paragraph; the run's privacy card has the whole story."""
    if plan.finetune is None:
        return "The model was not fine-tuned: no sensitive image was read."
    if plan.non_private:
        return "**Not private**: the model was fine-tuned without noise. Do not share these images."
    return (
        f"Differentially private with ε = {spent:.4g} at δ = {plan.delta:.3g}, for adding or removing one of "
        f"{plan.n_records:,} training images ({plan.accountant.upper()} accountant). The run's `privacy_card.md` lists every "
        "use of the sensitive images."
    )


def _finite(epsilon: float) -> float | str:
    return epsilon if epsilon < float("inf") else "inf"  # JSON has no infinity


def _open_ledger(directory: RunDirectory, plan: PrivacyPlan) -> Ledger:
    if directory.ledger.exists():
        ledger = Ledger.open(directory.ledger)
        if ledger.plan != plan:
            raise RunDirectoryError(
                f"{directory.ledger}: was begun under another plan (data size or version of sapf changed?); "
                "start a new run in another directory"
            )
        return ledger
    directory.write_json(directory.plan, plan.to_dict())
    return Ledger.create(directory.ledger, plan)


def _learn(
    config: RunConfig, directory: RunDirectory, plan: PrivacyPlan, source: ImageSource, ledger: Ledger, stage: _Stages,
    report: Callable[[str], Callable[[int, int], None] | None],
) -> None:
    """The stages that read sensitive images: latents, selection, fine-tuning."""
    if ledger.events() and not directory.noise_key.exists():
        raise BudgetError(
            f"{directory.noise_key}: gone, but {directory.ledger.name} shows releases already paid for; they cannot be "
            "replayed without it and the budget does not pay them twice; start a new run in another directory"
        )
    directory.prepare_private()
    key = NoiseKey.load_or_create(directory.noise_key, config.privacy.reproducible_seed)
    fingerprint = _same_data(directory, source)
    stream = key.stream_id(fingerprint, plan.to_dict(), config_hash(config))
    device = pick_device(config.saliency.gpus_per_task)
    with stage("latents"):
        cache = build_latent_cache(
            directory.latents, source, config.model.path, config.model.dtype, device, config.saliency.shard_size,
            {"num_cpus": config.saliency.cpus_per_task, "num_gpus": config.saliency.gpus_per_task}, report("latents"),
        )
    if not directory.selection.exists():
        with stage("selection"):
            selection = select(
                config.model, cache, plan, config.saliency, key, stream, ledger, report("selection"), config.seed
            )
            directory.write_json(directory.selection, selection.to_dict())
    selected = directory.read_json(directory.selection)
    with stage("finetune"):
        job = FinetuneJob(
            config.model, selected["matrices"], cache, plan, config.finetune, key, stream,
            str(directory.ledger.resolve()), config.seed,
        )
        finetune(job, directory.checkpoints, directory.adapter, report("finetune"))


def _same_data(directory: RunDirectory, source: ImageSource) -> str:
    """The data's fingerprint; refuses to continue on other data, where old noise must not meet new sums."""
    fingerprint = source.fingerprint()
    path = directory.private / "data_fingerprint"
    if path.exists() and path.read_text() != fingerprint:
        raise RunDirectoryError(
            f"--out {directory.root}: the data set changed since this run began; start a new run in another directory"
        )
    write_atomic(path, fingerprint)
    path.chmod(0o600)
    return fingerprint


def _evaluate(config: RunConfig, directory: RunDirectory, source: ImageSource, resolution: int) -> dict[str, float]:
    if directory.metrics.exists():
        saved = directory.read_json(directory.metrics)
        return {k: v for k, v in saved.items() if k.startswith(("fid", "accuracy"))}
    return evaluate_on_cluster(directory.synthetic, source, resolution, config.evaluation, config.seed)
