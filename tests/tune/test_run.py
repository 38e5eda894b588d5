"""A grid through Ray Tune.

Bounded, resumable, one failing cell does not end it, children nest under the parent.

The runs themselves are stubs here that leave a real run directory and a real MLflow run;
`test_real.py` runs real ones.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from sapf_ray import cluster
from sapf_ray.data.base import open_source
from sapf_ray.errors import SapfError
from sapf_ray.models.feature_table import record_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.runs import runlog
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.tune import trial
from sapf_ray.tune.budget import plan_cells
from sapf_ray.tune.grid import Grid, open_grid, raise_failures, run_grid
from sapf_ray.tune.run import _Private, check_resources, concurrency, run_cells
from sapf_ray.tune.space import load_space, make_cells
from tests.tune.test_space import write

GONE = trial.Failure(kind="DataError", message="data.path: gone")


@ray.remote(num_cpus=0, max_retries=0)
def stub(config: dict, out: str) -> trial.Failure | None:
    """A run without work.

    Counts its starts, breaks off once with seed 1, fails for good with seed 3.
    """
    from sapf_ray.config import from_dict
    from sapf_ray.runs.directory import RunDirectory
    from sapf_ray.runs.tracking import Tracker

    run = RunDirectory(out)
    whole = from_dict(config)
    run.claim(whole)
    try:
        Tracker.open(whole, run)
        starts = run.root / "starts"
        starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
        # nested work must find the cluster's CPUs free, whatever the trial's placement group says
        assert ray.get(ray.remote(num_cpus=2)(lambda: 5).remote()) == 5
        if whole.seed == 1 and starts.read_text() == "x":
            raise RuntimeError("lost a worker")
        if whole.seed == 3:
            return GONE
        run.write_json(
            run.metrics,
            {
                "accuracy": 0.5 + whole.seed / 10,
                "epsilon_spent": 1.5,
                "seconds": {"finetune": 30.0},
            },
        )
        run.card.write_text("card")
        return None
    finally:
        run.release()  # as a run does, however it ends


@pytest.fixture
def space(tmp_path):
    return write(
        tmp_path,
        title="2 x 2",
        base={"finetune.steps": 2, "finetune.batch_size": 64, "privacy.accountant": "rdp"},
        axes={"method": ["dp-lora", "dp-sapf"], "seed": [1, 3]},
    )


def test_grid_of_four_with_a_failing_and_a_broken_cell_then_resume(
    ray_cluster, tmp_path, space, monkeypatch
):
    monkeypatch.setattr(
        "sapf_ray.tune.grid.run_cells", lambda *a, **k: run_cells(*a, **k, task=stub)
    )
    grid = open_grid(space, str(tmp_path / "grid"))
    console = Console(record=True, width=200, quiet=False)
    report, outcome = run_grid(grid, console, max_concurrent=2, retries=1)
    said = console.export_text()

    assert outcome.failed == {f"{method}_seed3": GONE for method in ("dp-lora", "dp-sapf")}
    assert "broke off dp-lora_seed1" in said and "4/4 done" in said
    assert [(row["runs"], row["cells"], row["accuracy"]) for row in report.rows] == [
        (1, 2, 60.0)
    ] * 2
    assert "failed: DataError" in report.render("markdown")
    assert "data.path" not in report.render("markdown"), "a message may name a file"
    with pytest.raises(
        SapfError, match=r"2 cells failed: dp-lora_seed3: data\.path: gone, and 1 more"
    ):
        raise_failures(outcome)
    starts = {
        path.parent.name: len(path.read_text()) for path in (tmp_path / "grid").glob("*/starts")
    }
    assert starts == {
        "dp-lora_seed1": 2,
        "dp-sapf_seed1": 2,
        "dp-lora_seed3": 1,
        "dp-sapf_seed3": 1,
    }
    assert (tmp_path / "grid" / "space.csv").read_text().startswith("method,runs,accuracy")
    assert not (tmp_path / "grid" / ".tune").exists()
    _check_tracking(grid, tmp_path)

    again = [
        item
        for item in grid.planned
        if item.cell.labels["seed"] == 1 or item.cell.method == "dp-lora"
    ]
    _, outcome = run_grid(Grid(space=grid.space, planned=again, out=grid.out), console, retries=0)
    starts = {
        path.parent.name: len(path.read_text()) for path in (tmp_path / "grid").glob("*/starts")
    }
    assert starts == {
        "dp-lora_seed1": 2,
        "dp-sapf_seed1": 2,
        "dp-lora_seed3": 2,
        "dp-sapf_seed3": 1,
    }, "finished cells are kept"
    assert list(outcome.failed) == ["dp-lora_seed3"]


def _check_tracking(grid: Grid, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("space")
    runs = client.search_runs([experiment.experiment_id])
    assert not [run for run in runs if "mlflow.parentRunId" in run.data.tags], "nothing is folded"
    parents = [run for run in runs if "sapf.grid" not in run.data.tags]
    assert len(runs) == 5 and len(parents) == 1
    assert {run.data.tags.get("sapf.grid") for run in runs} == {None, parents[0].info.run_id}
    tags = parents[0].data.tags
    assert tags["grid.failed"] == "2" and parents[0].info.status == "FAILED"
    assert float(tags["grid.total_epsilon.digits"]) > 10 and not parents[0].data.metrics
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "| dp-sapf |" in experiment.tags["mlflow.note.content"]
    assert parents[0].data.params["finetune.steps"] == "2" and "seed" not in parents[0].data.params


def test_a_cell_that_wants_more_than_the_cluster_has_starts_nothing(ray_cluster, tmp_path):
    path = write(
        tmp_path,
        base={"privacy.accountant": "rdp", "finetune.batch_size": 64, "finetune.steps": 2},
        rows={"one": {"seed": 0}, "nine": {"seed": 1, "finetune.num_workers": 9}},
    )
    planned = plan_cells(make_cells(load_space(path)))
    with pytest.raises(
        SapfError, match=r"cell nine: finetune\.cpus_per_worker: asks for 9 CPUs .* has 2"
    ):
        run_cells(planned, tmp_path / "grid", say=lambda text: None, task=stub)
    assert not (tmp_path / "grid").exists()
    check_resources(planned[:1])


def test_concurrency_is_what_fits_of_the_largest_cell(ray_cluster, tmp_path):
    path = write(tmp_path, rows={"one": {"seed": 0}, "two": {"seed": 1, "finetune.num_workers": 2}})
    one, two = (cell.config for cell in make_cells(load_space(path)))
    assert (concurrency([one]), concurrency([one, two])) == (2, 1)
    assert ray.cluster_resources()["CPU"] == 2 and cluster.wants(one)[1].count == 1


def test_shared_latents_of_a_model_with_class_labels_go_with_its_last_cell(tmp_path, monkeypatch):
    """The folder a run writes to is the one the grid deletes.

    Whatever of the model's config decides what is in it.
    """
    base = {
        "finetune.steps": 2,
        "finetune.batch_size": 64,
        "privacy.accountant": "rdp",
        "model.path": "glyphs-dit-tiny",
        "model.class_labels": list(range(10, 20)),
    }
    planned = plan_cells(
        make_cells(load_space(write(tmp_path, base=base, axes={"method": ["dp-lora"]})))
    )
    config = planned[0].cell.config
    source = open_source(config.data)
    model = PublicModel.open(config.model)
    features = record_features(config, planned[0].plan)
    assert features is not None
    key = model.latents_key(source.fingerprint(), source.prompts, features.key)
    folder = (tmp_path / ".latents").resolve() / key
    folder.mkdir(parents=True)
    latents = _Private(planned, tmp_path)
    assert latents.clean() == [folder]
    monkeypatch.setattr("sapf_ray.tune.run.is_finished", lambda cell, out: True)
    assert latents.clean() == [] and not folder.exists()


@ray.remote(num_cpus=0)
def staged(config: dict, out: str) -> str | None:
    """A run of two stages that the trial has time to see."""
    run = RunDirectory(out)
    place = runlog.Place(path=str(run.log), run="r")
    with runlog.recording(place):
        for name in ("selection", "finetune"):
            with runlog.stage_events(name):
                time.sleep(0.6)
    run.write_json(run.metrics, {"accuracy": 0.5, "epsilon_spent": 1.5, "seconds": {"plan": 1.0}})
    return None


def test_a_trial_reports_stages_and_scores_to_tune(ray_cluster, tmp_path, monkeypatch):
    reports: list[dict] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    monkeypatch.setattr(trial, "WATCH_SECONDS", 0.1)
    (tmp_path / "cell").mkdir()
    job = trial.CellJob({}, str(tmp_path / "cell"))
    trial.trial({"cell": "cell"}, {"cell": job}, task=staged)
    assert [report["stage"] for report in reports] == ["selection", "finetune", "end"]
    assert reports[-1] == {"stage": "end", "accuracy": 0.5, "epsilon_spent": 1.5}
