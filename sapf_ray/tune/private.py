"""``sapf tune --private``: trials that nobody sees, of which the best-scoring one is released.

The number of trials, the cell of each and the records held out for scores follow from one secret
key, so the same command continues an interrupted choice as it was drawn. Trials run one after the
other in a private folder (mode 0700) under random names; of their scores a noisy number each is
kept, of the trials the best so far. In the end the winner is copied to ``chosen/``, without log and
checkpoints and with the time of the copy on every file, and all else is deleted: neither names nor
dates tell how many there were. How long it took does, to whoever watches (docs/tuning.md).

References:
    1. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022.
       (algorithm 1)
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from sapf_ray import cluster
from sapf_ray.config import RunConfig, config_hash, to_dict
from sapf_ray.data.base import open_source
from sapf_ray.data.held_out import draw_split
from sapf_ray.errors import RunDirectoryError, SapfError
from sapf_ray.files import only_one, short_hash, write_json
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.session import keep_fingerprint
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.tune.private_plan import Choice
from sapf_ray.tune.run import RETRIES
from sapf_ray.tune.space import Cell
from sapf_ray.tune.trial import Failure, run_cell

Say = Callable[[str], None]

WATCHED = (
    "The number of trials is secret and no progress is shown: whoever sees how long this takes can "
    "guess it, and the guarantee does not cover that."
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Files of a choice.

    Args:
        out: Its directory.
    """

    out: Path

    @property
    def private(self) -> Path:
        """Everything secret; deleted at the end."""
        return self.out / "private"

    @property
    def key(self) -> Path:
        return self.private / "noise_key"

    @property
    def split(self) -> Path:
        return self.private / "held_out.npy"

    @property
    def trials(self) -> Path:
        return self.private / "trials"

    @property
    def scores(self) -> Path:
        """Noisy scores of the trials that are over, by name."""
        return self.private / "scores.json"

    @property
    def fingerprint(self) -> Path:
        return self.private / "choice"

    @property
    def chosen(self) -> RunDirectory:
        """The winner's run directory."""
        return RunDirectory(self.out / "chosen")

    @property
    def result(self) -> Path:
        """Which cell was chosen, with its noisy score: released with the winner."""
        return self.out / "choice.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One secret trial.

    Attributes:
        name: Random; says nothing of its place among the trials.
        cell: What it runs.
    """

    name: str
    cell: Cell


def draw_trials(choice: Choice, key: NoiseKey) -> list[Trial]:
    """All trials of a choice: K from its distribution, each a cell drawn uniformly, with
    replacement.

    Args:
        choice: The cells, and how trials are repeated.
        key: Secret.
    """
    (n,) = choice.repeat.draw(key.stream("number of trials").uniform(1).numpy())
    cells = (key.stream("cells").uniform(int(n)) * len(choice.planned)).long().tolist()
    return [
        Trial(name=key.stream_id("trial", i), cell=choice.planned[cell].cell)
        for i, cell in enumerate(cells)
    ]


def run_choice(choice: Choice, *, say: Say, retries: int = RETRIES, task: Any = run_cell) -> Places:
    """Runs or continues a private choice; its winner is then evaluated and has its card.

    Args:
        choice: From :func:`sapf_ray.tune.private_plan.open_choice`.
        say: Called with one line per event that is no secret.
        retries: Number of retries of a trial that broke off.
        task: The Ray task that makes one run.

    Raises:
        SapfError: A trial failed, or none was drawn.
    """
    places = Places(out=choice.out.resolve())
    places.out.parent.mkdir(parents=True, exist_ok=True)
    places.out.mkdir(mode=0o700, exist_ok=True)
    first = choice.planned[0].cell.config
    with cluster.session(first.cluster, spills=places.out / "spilled"):
        if not places.result.exists():
            say(WATCHED)
            _run_trials(choice, places, retries=retries, task=task)
        _forget(places)
        _conclude(choice, places, retries=retries, task=task)
    return places


def result_lines(places: Places) -> list[str]:
    """What was chosen, in words."""
    found = RunDirectory.read_json(places.result)
    metrics = RunDirectory.read_json(places.chosen.metrics)
    return [
        f"chosen: {found['cell']}, noisy accuracy {100 * found['noisy_accuracy']:.1f} ± "
        f"{100 * found['noise']:.1f} % on the held-out images, the best of its trials",
        f"{places.chosen.root}: ε = {found['epsilon']:.4g} at δ = {found['delta']:.3g} for the "
        f"choice and its winner together; for release: {metrics['release']}",
    ]


def _run_trials(choice: Choice, places: Places, *, retries: int, task: Any) -> None:
    with only_one(places.private):
        if places.result.exists():  # by the process that was waited for
            return
        keep_fingerprint(
            places.fingerprint,
            _fingerprint(choice),
            refusal=f"--out {choice.out}: holds a choice that was begun with other cells or "
            "settings; use another directory, or the same command to continue it",
        )
        key = NoiseKey.load_or_create(places.key)
        if not places.split.exists():
            images = open_source(choice.planned[0].cell.config.data).n_train
            draw_split(places.split, images, choice.repeat.held_out, key=key)
        trials = draw_trials(choice, key)
        if not trials:
            raise SapfError(
                "no trial was drawn, as happens with probability "
                f"{math.exp(-choice.repeat.mean):.2g}: nothing was read and nothing is "
                f"released; another choice, in another directory than {places.out}, costs its own ε"
            )
        scores: dict[str, float] = {}
        if places.scores.exists():
            scores = RunDirectory.read_json(places.scores)
        for trial in trials:
            if trial.name not in scores:
                _run(secret_config(trial.cell, places), places.trials / trial.name, retries, task)
                score = RunDirectory(places.trials / trial.name).score
                scores[trial.name] = RunDirectory.read_json(score)["noisy_correct"]
                write_json(places.scores, scores, mode=0o600)
            _keep_best(places, scores)
        best = max(trials, key=lambda trial: scores[trial.name])
        _move_out(choice, places, best=best, score=scores[best.name])


def _fingerprint(choice: Choice) -> str:
    """Of all that trials are drawn from: with another number of them the price would be another."""
    cells = [(item.cell.name, config_hash(item.cell.config)) for item in choice.planned]
    return short_hash([cells, choice.plan.to_dict()], digits=64)


def secret_config(cell: Cell, places: Places) -> RunConfig:
    """A cell's config as a trial runs it: nothing leaves the private folder, nothing is shared
    with another trial but the encoded images, and its own private files stay until it is judged.
    """
    config = cell.config
    return replace(
        config,
        tuning=replace(config.tuning, split=str(places.split)),
        tracking=replace(config.tracking, enabled=False),
        cluster=replace(
            config.cluster,
            keep_cache=True,
            latents_dir=str(places.private / "latents"),
            selection_dir=None,
            storage=None,
        ),
    )


def _run(config: RunConfig, out: Path, retries: int, task: Any) -> None:
    """One run in a process of its own.

    Raises:
        SapfError: It failed for good. A message of a trial names no trial.
    """
    for left in range(retries, -1, -1):
        run = task.options(name="trial", scheduling_strategy="DEFAULT")
        try:
            failure: Failure | None = cluster.result(run.remote(to_dict(config), str(out)))
        except (SapfError, ray.exceptions.RayError) as error:
            if left == 0:
                raise SapfError(
                    f"a trial broke off ({type(error).__name__}); the same command goes on"
                ) from error
            continue
        if failure is not None:
            raise SapfError(f"a trial failed ({failure.kind}): {failure.message}")
        return


def _keep_best(places: Places, scores: dict[str, float]) -> None:
    """Deletes every trial that cannot win any more."""
    best = max(scores, key=lambda name: scores[name])
    for folder in places.trials.iterdir():
        if folder.name in scores and folder.name != best:
            shutil.rmtree(folder)


def _move_out(choice: Choice, places: Places, *, best: Trial, score: float) -> None:
    """The winner leaves the private folder, without what tells when it ran."""
    winner = RunDirectory(places.trials / best.name)
    chosen = places.chosen
    if not chosen.root.exists():  # else an earlier start has copied it
        winner.log.unlink(missing_ok=True)
        shutil.rmtree(winner.checkpoints, ignore_errors=True)  # their names are times
        copy = places.private / "chosen"  # files remember when they were made: new ones do not
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(winner.root, copy)
        os.rename(copy, chosen.root)
    plan, held_out = choice.plan, choice.repeat.held_out
    assert plan.score is not None
    for folder, _, files in os.walk(chosen.root):
        for name in (*files, "."):
            os.utime(Path(folder) / name)
    found = {
        "cell": best.cell.name,
        "labels": {axis: str(label) for axis, label in best.cell.labels.items()},
        "noisy_accuracy": score / held_out,
        "noise": plan.score.noise_multiplier / held_out,
        "epsilon": plan.composed_epsilon,
        "delta": plan.delta,
    }
    write_json(places.result, found)


def _forget(places: Places) -> None:
    """Deletes all that was not chosen, and the key.

    Raises:
        RunDirectoryError: Some of it is still there.
    """
    shutil.rmtree(places.private, ignore_errors=True)
    if places.private.exists():
        raise RunDirectoryError(
            f"{places.private}: cannot be deleted, and holds trials that must stay secret; delete "
            "it, then give the same command again"
        )


def _conclude(choice: Choice, places: Places, *, retries: int, task: Any) -> None:
    """What a run does once its releases are over: its scores, its card, its place in MLflow."""
    found = RunDirectory.read_json(places.result)
    cells = {item.cell.name: item.cell for item in choice.planned}
    if found["cell"] not in cells:
        raise RunDirectoryError(
            f"--out {choice.out}: holds a choice among other cells; use another directory"
        )
    cell = cells[found["cell"]]
    config = replace(cell.config, tuning=replace(cell.config.tuning, split=str(places.split)))
    places.chosen.delete_private()
    _run(config, places.chosen.root, retries, task)
