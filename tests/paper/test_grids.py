"""The paper's tables with our numbers beside the printed ones, from finished run directories."""

from __future__ import annotations

import pytest

from sapf_ray.errors import ConfigError
from sapf_ray.paper.grids import (
    PAPER_GRIDS,
    check_name,
    names,
    paper_report,
    paper_rows,
    write_plots,
)
from sapf_ray.paper.matrices import block_rows
from sapf_ray.tune.budget import plan_cells
from sapf_ray.tune.grid import Grid
from sapf_ray.tune.resources import guessed_seconds
from sapf_ray.tune.space import load_space, make_cells
from sapf_ray.tune.summary import over_seeds
from sapf_ray.tune.trial import Failure
from tests.tune.test_budget import finish, plan_without_search

METRICS = {
    "accuracy": 0.75,
    "fid": 20.0,
    "epsilon_spent": 9.9,
    "peak_memory_mb": {"latents": 1024.0, "finetune": 2048.0},
    "seconds": {"latents": 1800.0, "selection": 1800.0, "finetune": 7200.0, "synthesis": 3600.0},
}


@pytest.fixture(autouse=True)
def no_accounting(monkeypatch):
    """Noise and totals of full-scale grids take many seconds; test_plans.py tests them."""
    monkeypatch.setattr("sapf_ray.paper.grids.privacy_notes", lambda planned, out: [])
    monkeypatch.setattr("sapf_ray.tune.budget.make_plan", plan_without_search)


def grid_of(name, tmp_path, *, smoke=False, only=None, done=0):
    space = load_space(name, smoke)
    planned = plan_cells(make_cells(space, {}, only=only))
    for item in planned[:done]:
        run = finish(item.cell, tmp_path, {})
        run.write_json(run.metrics, METRICS)
        names = [
            f"down_blocks.0.attentions.0.transformer_blocks.0.{part}"
            for part in ("attn2.to_v", "attn1.to_q", "attn1.to_k")
        ]
        run.write_json(run.selection, {"matrices": names})
    return Grid(space=space, planned=planned, out=tmp_path)


def test_what_reproduce_takes():
    assert names() == [f"table{n}" for n in (2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15)] + [
        f"figure{n}" for n in (4, 5, 6, 7)
    ]
    with pytest.raises(ConfigError, match=r"table = 'table99': must be one of table2, table5"):
        check_name("table99")


@pytest.mark.parametrize("name", sorted(PAPER_GRIDS))
def test_every_printed_row_has_a_place_and_missing_ones_are_marked(name, tmp_path):
    grid = grid_of(name, tmp_path, done=1)
    failure = Failure(kind="OutOfMemoryError", message="a worker was killed")
    report = paper_report(name, grid, failed={grid.planned[-1].cell.name: failure})
    text = report.render("markdown")
    assert "failed: OutOfMemoryError" in text and "missing" in text
    if name not in ("table7", "table12"):
        ours = [row for row in report.rows if row.get("accuracy") is not None]
        assert [row["accuracy"] for row in ours] == [75.0]
        printed = [row["paper_acc"] for row in report.rows if row.get("paper_acc") is not None]
        want = [row["acc"] for row in paper_rows(name) if row["acc"] is not None]
        if not name.startswith("figure"):
            assert set(want) <= set(printed)
        else:
            assert printed
    for form in ("csv", "md", "tex"):
        assert (tmp_path / f"{name}.{form}").stat().st_size > 100


def test_a_dry_run_of_table_12_says_the_papers_hours():
    """At 256 pixels, on four A6000s. Of PE the paper tells no population, so no work."""
    hours: dict[str, float] = {}
    for row in paper_rows("table12"):
        hours[row["method"]] = hours.get(row["method"], 0.0) + row["hours"]
    for item in plan_cells(make_cells(load_space("table12"), {})):
        method = item.cell.labels["method"]
        assert item.cell.config.model.resolution == 256
        if not item.cell.config.evolution.enabled:
            printed = hours[method.partition(",")[0]]
            seconds = guessed_seconds(item.cell.config, item.plan)
            assert seconds / 3600 == pytest.approx(printed, rel=0.25), method


def test_table5_pairs_belong_together(tmp_path):
    rows = paper_report(
        "table5",
        grid_of("table5", tmp_path, only={"model": "SD-v1-5", "dataset": "cifar10"}, done=1),
    ).rows
    (row,) = [
        row for row in rows if row["method"] == "PE" and row["epsilon"] == 1.0 and "runs" in row
    ]
    assert (row["accuracy"], row["paper_acc"], row["fid"], row["paper_fid"]) == (
        75.0,
        67.5,
        20.0,
        16.4,
    )
    ours = next(
        row
        for row in rows
        if row["method"] == "DP-SAPF, per-sample norms" and row["epsilon"] == 10.0
    )
    assert ours["paper_acc"] == 74.6, "ours stands beside the paper's DP-SAPF"


def test_smoke_pairs_are_said_to_be_no_comparison(tmp_path):
    report = paper_report("table2", grid_of("table2", tmp_path, smoke=True))
    assert report.notes[0].startswith(
        "The paper's numbers beside ours belong to SD-v1-5 (beside glyphs-tiny), cifar10"
    )
    assert [row["paper_acc"] for row in report.rows] == [13.3, 69.7, 82.4, 74.6, 74.6]


def test_table12_takes_stages_and_table15_hours(tmp_path):
    rows = paper_report(
        "table12", grid_of("table12", tmp_path, only={"method": "DP-SAPF"}, done=1)
    ).rows
    assert [(row["stage"], row["hours"], row["gb"], row["paper_hours"]) for row in rows] == [
        ("select", 1.0, 1.0, 0.6),
        ("finetune", 2.0, 2.0, 3.5),
        ("synthesis", 1.0, 0.0, 1.9),
    ]
    only = {"method": "DP-SAPF", "dataset": "cifar10"}
    report = paper_report("table15", grid_of("table15", tmp_path / "15", only=only, done=1))
    assert (report.rows[0]["select_hours"], report.rows[0]["paper_hours"]) == (1.0, 0.6)


def test_table7_maps_names_to_blocks_and_draws_both(tmp_path):
    grid = grid_of("table7", tmp_path, only={"ratio": "0.3"}, done=1)
    report = paper_report("table7", grid)
    first = report.rows[0]
    assert (first["block"], first["attn1"], first["attn2"]) == ("D0-A0", "kq", "v")
    assert first["paper_attn2"] is not None and len(report.rows) == 16
    (path,) = write_plots("table7", report, grid=grid)
    assert path.stat().st_size > 5000
    others = [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.7.attn1.to_v",
        "conv",
    ]
    assert block_rows(others) == {"M-A0": {"attn1": "o"}, "T7": {"attn1": "v"}}


@pytest.mark.parametrize("name", ["figure4", "figure5"])
def test_figures_are_drawn(name, tmp_path):
    grid = grid_of(name, tmp_path, only={"dataset": "cifar10"}, done=3)
    (path,) = write_plots(name, paper_report(name, grid), grid=grid)
    assert path.stat().st_size > 5000


def test_seeds_are_averaged_and_the_deviation_is_of_a_sample():
    done = {
        "status": "done",
        "seconds": {},
        "peak_memory_mb": {},
        "matrices": [],
        "epsilon_spent": 1.0,
    }
    rows = [{"method": "a", "seed": seed, "accuracy": 70.0 + 2 * seed, **done} for seed in (0, 1)]
    (row,) = over_seeds(
        [*rows, {"method": "a", "seed": 2, "status": "missing"}], ["method", "seed"]
    )
    assert (row["accuracy"], row["accuracy_sd"], row["runs"], row["cells"]) == (
        71.0,
        pytest.approx(2**0.5),
        2,
        3,
    )
