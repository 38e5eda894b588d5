"""What a later result of a finished run leaves: scores, a card, an entry in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sapf_ray import __version__
from sapf_ray.afterwards import Result, summary
from sapf_ray.config import flatten, from_dict, nest, to_dict
from sapf_ray.errors import TrackingError
from sapf_ray.evaluation.metrics import METRICS, from_real_images, shown
from sapf_ray.files import write_atomic, write_json
from sapf_ray.runs.directory import ResultDirectory, RunDirectory
from sapf_ray.runs.finished import FinishedRun
from sapf_ray.runs.tracking import Tracker


def conclude(run: FinishedRun, directory: ResultDirectory) -> Result:
    """Writes scores and card, publishes images, and logs the result below the run's MLflow entry.

    Raises:
        RunDirectoryError: ``cluster.storage`` failed; the result is in its folder.
    """
    metrics = summary(run)
    write_json(directory.metrics, metrics)
    write_atomic(directory.card, _card(run, directory, metrics))
    run.publish()
    return Result(
        directory=directory,
        plan=run.plan,
        metrics=metrics,
        tracking_uri=_track(run, directory, metrics),
        verdict=run.verdict,
    )


def _card(run: FinishedRun, directory: ResultDirectory, metrics: Mapping[str, Any]) -> str:
    """README.md of the result's folder."""
    scores = {name: metrics[name] for name in METRICS if name in metrics and METRICS[name].headline}
    of = directory.root.resolve().name
    planned = run.plan.epsilon if run.plan.reads_images else 0.0
    sections = [
        f"# {directory.name}",
        f"> {run.verdict.markdown}",
        f"Made by `sapf-ray` {__version__} from the finished run `{of}`: post-processing of what "
        f"it released. Its ledger was not touched, its ε ({run.spent:.4g} spent of {planned:.4g} "
        f"planned, δ = {run.plan.delta:.3g}) is unchanged and covers these results too; "
        f"`../../{directory.run_card.name}` lists every use of the sensitive images.",
    ]
    if run.changed:
        rows = [f"| `{key}` | {old} | {new} |" for key, (old, new) in run.changed.items()]
        sections.append("\n".join(["| setting | run | here |", "|---|---|---|", *rows]))
    if scores:
        rows = [
            f"| {METRICS[name].title} | {shown(name, score)} |" for name, score in scores.items()
        ]
        sections += [
            "\n".join(["| score | |", "|---|---|", *rows]),
            "Scores are measured on real images without noise: a measurement for research, not "
            "covered by ε and not to be released with the images.",
        ]
    return "\n\n".join(sections) + "\n"


def _track(run: FinishedRun, directory: ResultDirectory, metrics: dict[str, Any]) -> str | None:
    """Logs the result to MLflow; a store that cannot be used costs a warning."""
    mlflow = RunDirectory(directory.root).mlflow
    parent = directory.read_json(mlflow)["run_id"] if mlflow.exists() else None
    flat = flatten(to_dict(run.config)) | {"tracking.parent_run_id": parent}
    try:
        tracker = Tracker.open(from_dict(nest(flat)), directory)
    except TrackingError as error:
        logging.getLogger(__name__).warning("sapf: warning: not logged to MLflow: %s", error)
        return None
    tracker.finish_result(
        directory, run.verdict, metrics=metrics, not_private=from_real_images(metrics)
    )
    return tracker.uri
