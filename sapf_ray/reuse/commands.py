"""``sapf synthesize`` and ``sapf evaluate`` of a finished run, and ``sapf run`` of one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapf_ray import cluster, placement
from sapf_ray.afterwards import RELEASE, Note, Result, inspect, splits_to_read
from sapf_ray.config import AFTERWARDS, RunConfig
from sapf_ray.config.later import NAME, name_of
from sapf_ray.config.section import require
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.verdict import check_release
from sapf_ray.reuse.conclusion import conclude
from sapf_ray.reuse.finished import Finished, is_finished, test_source
from sapf_ray.runs import runlog
from sapf_ray.runs.context import Progress
from sapf_ray.runs.directory import (
    EVALUATION,
    SYNTHESIS,
    ResultDirectory,
    RunDirectory,
    changed_keys,
)
from sapf_ray.runs.finished import open_result
from sapf_ray.runs.manifest import write_manifest
from sapf_ray.shared_directory import check_shared
from sapf_ray.stages import Stage


def synthesize(
    run: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
    since: float | None = None,
) -> Result:
    """More synthetic images of a finished run; reads no sensitive image and spends nothing.

    Images that the run, or an earlier result of it, has already are copied: 4,000 images begin with
    the 2,000 of the run, and are byte for byte those of a run that had made 4,000 at once.

    Args:
        run: Run directory, also a moved or copied one; or ``RUN/synthesis/NAME``, to go on from its
            settings.
        changes: Keys of the config to change, dotted or nested, e.g.
            ``{"synthesis": {"n_images": 4000}}``; see :func:`sapf_ray.config.later.later_keys`.
        name: Name of the result, made from the changes unless given.
        on_progress: Called with (stage, done, total).
        on_note: Called with a line for the user, and whether it is for the terminal only.
        since: ``time.time()`` from which on time counts as the result's, now unless given.

    Raises:
        RunDirectoryError: No run, an unfinished one, or one whose images evolved.
        ConfigError: A key that cannot be changed any more.
        SapfError: As a run's own synthesis.
    """
    finished = Finished.open(run)
    if finished.plan.evolution is not None:
        raise RunDirectoryError(
            f"{run}: its images evolved by votes of the sensitive ones, there is no adapter to "
            "make more from; start a new run with another synthesis.n_images"
        )
    config = finished.changed("synthesize", changes or {})
    if name is None and not changed_keys(finished.own, config):
        raise ConfigError(
            "synthesize", str(run), "nothing is changed; give e.g. --synthesis.n_images, or --name"
        )
    return _make(
        finished,
        config,
        kind=SYNTHESIS,
        name=name,
        source=finished.classes,
        stages=(Stage.SYNTHESIS, Stage.PICTURES),
        show=Show(on_progress=on_progress, on_note=on_note, since=since),
    )


def evaluate(
    run: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
    since: float | None = None,
) -> Result:
    """Other scores of a finished run: other classifiers, metrics, test images.

    Reads real test images, and training images only where a score asks for them: a non-private
    measurement, as in a run.

    Args:
        run: Run directory, also a moved or copied one; or ``RUN/synthesis/NAME``.
        changes: As :func:`synthesize`; e.g. ``{"evaluation.classifiers": ["wrn"]}``, or
            ``data.path`` for other test images.
        name: As :func:`synthesize`, like the rest.
        on_progress: Called with (stage, done, total).
        on_note: Called with a line for the user.
        since: ``time.time()`` from which on time counts as the result's.

    Raises:
        SapfError: As :func:`synthesize`, and as a run's own evaluation.
    """
    finished = Finished.open(run)
    config = finished.changed("evaluate", changes or {}, scored=True)
    same_data = config.data.source == finished.own.data.source
    if same_data and config.data.path == finished.own.data.path:
        require(
            config.evaluation.test_images == "split",
            "evaluation.test_images",
            config.evaluation.test_images,
            "must be split on the run's own data, of which some were trained on",
        )
    return _make(
        finished,
        config,
        kind=EVALUATION,
        name=name,
        source=test_source(config),
        stages=(Stage.EVALUATION,),
        show=Show(on_progress=on_progress, on_note=on_note, since=since),
    )


def asks_for_more(config: RunConfig, out: str) -> bool:
    """Whether ``out`` holds the finished run of ``config``, but for keys that count after the last
    release only, so that what is asked for can be made from it.
    """
    directory = RunDirectory(out)
    if not directory.config.is_file() or not is_finished(directory):
        return False
    sections = {key.partition(".")[0] for key in directory.differences(config)}
    if not sections or not sections <= AFTERWARDS:
        return False
    if SYNTHESIS in sections:
        return not config.evolution.enabled
    return config.evaluation.enabled


def make_more(
    config: RunConfig,
    out: str,
    *,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
    since: float | None = None,
) -> Result:
    """What ``sapf run`` does where :func:`asks_for_more`: the stages after the last release, anew.

    Args:
        config: The whole experiment, as it is asked for now.
        out: Directory of the finished run.
        on_progress: As :func:`synthesize`, like the rest.
        on_note: Called with a line for the user.
        since: ``time.time()`` from which on time counts as the result's.

    Raises:
        SapfError: As :func:`synthesize` and :func:`evaluate`.
    """
    finished = Finished.open(out)
    images = any(key.startswith("synthesis.") for key in changed_keys(finished.own, config))
    stages = tuple(step.stage for step in RELEASE) if images else (Stage.EVALUATION,)
    return _make(
        finished,
        config,
        kind=SYNTHESIS if images else EVALUATION,
        name=None,
        source=open_source(config.data) if config.evaluation.enabled else finished.classes,
        stages=stages,
        show=Show(on_progress=on_progress, on_note=on_note, since=since),
    )


@dataclass(frozen=True, kw_only=True)
class Show:
    """Where a command shows what it does, and since when it is under way."""

    on_progress: Progress | None
    on_note: Note | None
    since: float | None


def _make(
    finished: Finished,
    config: RunConfig,
    *,
    kind: str,
    name: str | None,
    source: ImageSource,
    stages: tuple[Stage, ...],
    show: Show,
) -> Result:
    """Runs the stages over the finished run, in a folder of their own.

    Args:
        finished: The run.
        config: Its settings with what is changed.
        kind: Folder of the result in the run directory.
        name: Name of the result, made from the changes unless given.
        source: The images that scores are measured on, or the bare classes.
        stages: What to make, some of ``RELEASE``.
        show: Where to show it.
    """
    began = time.time() if show.since is None else show.since
    changed = changed_keys(finished.own, config)
    changed.pop("model.path", None)  # where the same files lie
    directory = ResultDirectory(
        finished.root,
        kind,
        name=name or _name(finished, changed, kind=kind),
        data_set=finished.data_set if kind == EVALUATION else None,
    )
    require(
        NAME.fullmatch(directory.home.name) is not None,
        "--name",
        name,
        "must be letters, digits and . _ - = +",
    )
    model = PublicModel.read(config.model)
    finished.check(config, source=source, model=model, images=Stage.SYNTHESIS in stages)
    with open_result(
        config,
        directory,
        source=source,
        model=model,
        plan=finished.plan,
        changed=changed,
        on_progress=show.on_progress,
        since=began,
    ) as context:
        if context.storage is not None:  # fails now rather than at the end
            check_release(context.verdict, config.cluster)
        if show.on_note is not None:
            show.on_note(context.verdict.plain, False)
        with cluster.session(config.cluster, spills=directory.spilled):
            gpus = placement.cluster_gpus()
            config = placement.placed(config, gpus, model_gb=model.sampling_gb)
            context = replace(context, config=config)
            cluster.require([want for want in cluster.wants(config) if want.section in stages])
            check_shared(directory.home)
            if Stage.EVALUATION in stages and config.evaluation.enabled:
                inspect(context, splits_to_read(config, learns=False), on_note=show.on_note)
            for step in RELEASE:
                if step.stage in stages:
                    step(context)
        result = conclude(context, directory)
        runlog.event("run_ended", seconds=round(time.time() - began, 2))
        return replace(result, manifest=write_manifest(directory))


def _name(finished: Finished, changed: Mapping[str, tuple[Any, Any]], *, kind: str) -> str:
    """Name of a result by what it is about and what is changed."""
    new = {key: value for key, (_, value) in changed.items() if key != "evaluation.enabled"}
    if kind == EVALUATION and finished.result is not None:
        theirs = changed_keys(finished.own, finished.config)
        new = {key: value for key, value in new.items() if key not in theirs}
        return f"{finished.result}-{name_of(new)}" if new else finished.result
    return name_of(new) if new else "default"
