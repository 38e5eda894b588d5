"""Results and checkpoints on a pyarrow file system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.files import below
from sapf_ray.runs.directory import EVALUATION, SYNTHESIS, ResultDirectory, RunDirectory
from sapf_ray.runs.storage import Storage


def finished(root: Path) -> RunDirectory:
    """A run directory with something in every place."""
    run = RunDirectory(root)
    for folder in (run.adapter, run.synthetic, run.private):
        folder.mkdir(parents=True)
    for path in (
        run.config,
        run.plan,
        run.ledger,
        run.selection,
        run.card,
        run.metrics,
        run.log,
        run.adapter / "weights",
        run.synthetic / "train-0.parquet",
        run.noise_key,
    ):
        path.write_text(path.name)
    return run


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


RELEASED = {
    "config.yaml",
    "plan.json",
    "ledger.jsonl",
    "selection.json",
    "privacy_card.md",
    "adapter/weights",
    "synthetic/train-0.parquet",
}


def test_what_the_run_releases_is_copied_once_and_nothing_private(tmp_path):
    run = finished(tmp_path / "run")
    there = tmp_path / "bucket" / "run"
    storage = Storage(f"file://{tmp_path}/bucket/", run)
    assert set(storage.publish()) == RELEASED
    assert names(there) == RELEASED | {"published.json", "run_id"}
    assert set(json.loads((there / "published.json").read_text())) == RELEASED
    assert (there / "adapter" / "weights").read_text() == "weights"
    assert Storage(f"file://{tmp_path}/bucket", run).publish() == []
    (run.synthetic / "train-1.parquet").write_text("more")
    assert storage.publish() == ["synthetic/train-1.parquet"]


def test_a_later_synthesis_is_published_in_a_folder_of_its_own_and_scores_never(tmp_path):
    run = finished(tmp_path / "run")
    there = tmp_path / "bucket" / "run"
    uri = f"file://{tmp_path}/bucket"
    Storage(uri, run).publish()
    more = ResultDirectory(run.root, SYNTHESIS, name="more")
    more.synthetic.mkdir(parents=True)
    for path in (more.config, more.card, more.metrics, more.synthetic / "train-0.parquet"):
        path.write_text("later")
    assert set(Storage(uri, more).publish()) == {"config.yaml", "synthetic/train-0.parquet"}
    folder = there / "synthesis" / "more"
    assert names(folder) == {"config.yaml", "synthetic/train-0.parquet", "published.json"}
    assert set(json.loads((there / "published.json").read_text())) == RELEASED, "the run's stays"
    assert Storage(uri, more).publish() == [] == Storage(uri, run).publish()
    scores = ResultDirectory(run.root, EVALUATION, name="wrn", data_set=run.synthetic)
    scores.home.mkdir(parents=True)
    scores.config.write_text("later")
    assert Storage(uri, scores).publish() == [] and not (there / "evaluation").exists()


def test_a_broken_copy_is_told_and_made_good_by_the_next(tmp_path):
    run = finished(tmp_path / "run")
    there = tmp_path / "bucket" / "run"
    storage = Storage(f"file://{tmp_path}/bucket", run)
    (there / "synthetic").write_text("a file where the folder should be")
    with pytest.raises(
        RunDirectoryError, match=r"could not be copied .* the same command tries again"
    ) as caught:
        storage.publish()
    assert "\n" not in str(caught.value) and not (there / "published.json").exists()
    (there / "synthetic").unlink()
    assert "synthetic/train-0.parquet" in storage.publish() and (there / "published.json").exists()


def test_another_runs_folder_is_never_taken_over(tmp_path):
    Storage(f"file://{tmp_path}/bucket", finished(tmp_path / "a" / "run"))
    with pytest.raises(RunDirectoryError, match=r"run there belongs to another run"):
        Storage(f"file://{tmp_path}/bucket", finished(tmp_path / "b" / "run"))


@pytest.mark.parametrize("uri", ["nothing", "ftp://host/x", "file:///proc/nowhere"])
def test_storage_that_cannot_be_used_is_one_line(tmp_path, uri):
    with pytest.raises(ConfigError, match=r"cluster.storage = .*cannot be used") as caught:
        Storage(uri, finished(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "s3://bucket/runs?endpoint_override=minio:9000&scheme=http",
            "s3://bucket/runs/a?endpoint_override=minio:9000&scheme=http",
        ),
        ("s3://bucket/runs/", "s3://bucket/runs/a"),
        ("/runs/what?", "/runs/what?/a"),
    ],
)
def test_options_of_a_uri_stay_behind_its_path(uri, expected):
    assert below(uri, "a") == expected
