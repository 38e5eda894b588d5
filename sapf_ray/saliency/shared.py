"""One selection release for all runs that may share it.

The noisy scores of a selection do not depend on the ratio, on epsilon or on anything of
fine-tuning. Runs that agree in all that they do depend on may therefore use one release, and
whoever sees all those runs has seen it once: their total counts it once. Each run's own ledger
still pays it in full, before the run may look, so each run's own epsilon is the same as of a run
that selects for itself.

Only what the mechanism releases is passed on. The Gaussian mechanism releases every score, so any
ratio may be read off; the others release the choice alone, and so do the rounds of an iterative
score: those serve runs of the same ratio.

The folder has its own noise key. It is on disk before the release (a broken-off release is repeated
exactly) and deleted right after; whoever comes first makes the release, others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sapf_ray.config import RunConfig, result_keys
from sapf_ray.errors import RunDirectoryError
from sapf_ray.files import only_one, short_hash, write_json
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.privacy.session import keep_fingerprint
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.scores import n_selected, top_n
from sapf_ray.saliency.selection import Selection, release_names

_RELEASE = "selection.json"
_PRIVATE = "private"
_KEPT_AFTER = (
    "saliency.ratio",
    "saliency.granularity",
)  # what the ranking of released scores alone depends on
_SECTIONS = ("data", "model", "saliency")

MakeRelease = Callable[[Releaser], Selection]
"""Pays and makes the release through a releaser whose key is the folder's."""


def shared_folder(root: Path, config: RunConfig, *, plan: PrivacyPlan) -> Path:
    """Folder in ``root`` of the release that this run would use; the same for all runs that may
    share it.

    Runs of different seeds do not: repetitions should tell how much the selection's noise matters.
    """
    assert plan.selection is not None
    any_ratio = _releases_scores(plan)
    keys = {
        key: value
        for key, value in result_keys(config).items()
        if key.split(".")[0] in _SECTIONS and not (any_ratio and key in _KEPT_AFTER)
    }
    stage = asdict(replace(plan.selection, share=None))
    what = [keys, stage, plan.n_records, config.seed, config.privacy.reproducible_seed]
    return root / short_hash(what)


def private_folder(root: Path, config: RunConfig, *, plan: PrivacyPlan) -> Path:
    """What has to be deleted once no run needs to check its data against the release's."""
    return shared_folder(root, config, plan=plan) / _PRIVATE


def released_by(folder: Path) -> str | None:
    """Fingerprint of the key that drew the folder's release; None where there is none yet."""
    if not (folder / _RELEASE).exists():
        return None
    first = next(iter(_read(folder).noise_ids.values()))
    return first.rpartition("-")[0]


def shared_selection(
    root: Path, config: RunConfig, *, data: str, releaser: Releaser, make: MakeRelease
) -> Selection:
    """This run's selection, from the shared release in ``root``; makes that if no other run has.

    Args:
        root: Folder of the shared releases.
        config: The run's config.
        data: Fingerprint of the sensitive data.
        releaser: The run's own; its ledger pays.
        make: Makes the release through the releaser it is given.

    Raises:
        BudgetError: The release would pass this run's planned epsilon.
        RunDirectoryError: The release is of other data or of an earlier version, or the folder
            cannot be written.
    """
    plan = releaser.plan
    assert plan.selection is not None
    folder = shared_folder(root, config, plan=plan)
    try:
        with only_one(folder):
            made = (folder / _RELEASE).exists()
            if not made:
                (folder / _PRIVATE).mkdir(mode=0o700, exist_ok=True)
            if (folder / _PRIVATE).exists():
                keep_fingerprint(
                    folder / _PRIVATE / "data_fingerprint",
                    data,
                    refusal=f"cluster.selection_dir {root}: holds the selection release "
                    f"{folder.name} of other data; use another directory",
                )
            if not made:
                _make(folder, config, data=data, releaser=releaser, make=make)
            (folder / _PRIVATE / "noise_key").unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cluster.selection_dir {root}: cannot be read or written ({error.strerror})"
        ) from error
    found = _read(folder)
    for name in release_names(plan.selection.count):
        if name not in found.noise_ids:
            raise RunDirectoryError(
                f"cluster.selection_dir {root}: {folder.name} was written by an earlier version of "
                "sapf; use another directory"
            )
        releaser.pay_shared(name, stage="selection", noise_id=found.noise_ids[name])
    if not _releases_scores(plan):
        return found
    names = list(found.scores)
    values = torch.tensor(list(found.scores.values()), dtype=torch.float64)
    n = n_selected(len(names), config.saliency.ratio)
    kept = top_n(names, values, n=n, granularity=config.saliency.granularity)
    return replace(found, matrices=kept)


def _read(folder: Path) -> Selection:
    return Selection(**RunDirectory.read_json(folder / _RELEASE))


def _releases_scores(plan: PrivacyPlan) -> bool:
    return (
        plan.selection is not None
        and plan.selection.mechanism == "gaussian"
        and plan.selection.count == 1
    )


def _make(
    folder: Path, config: RunConfig, *, data: str, releaser: Releaser, make: MakeRelease
) -> None:
    secret = NoiseKey.load_or_create(
        folder / _PRIVATE / "noise_key", config.privacy.reproducible_seed
    )
    key = secret.bind("shared selection", data, folder.name)
    made = replace(make(replace(releaser, key=key)), shared=True)
    write_json(folder / _RELEASE, made.to_dict())
