"""The benchmark runs and names its figures; how fast anything is, no test says."""

from __future__ import annotations

import json
import math

import pytest

from jobs import benchmark
from jobs.bench import figures
from jobs.bench.contenders import CONTENDERS
from jobs.bench.models import Case
from jobs.bench.process import Entry, Measured, measure
from sapf_ray.errors import ConfigError

ISSUE_NAMES = {
    "selection_time_vs_plain",
    "selection_speedup_vs_opacus_hooks",
    "selection_speedup_vs_microbatch1",
    "selection_memory_growth_12_to_96",
    "dp_lora_time_vs_nonprivate",
    "dp_lora_memory_vs_nonprivate",
    "dp_lora_speedup_vs_opacus_hooks",
    "full_dp_memory_vs_nonprivate",
    "synthesis_speedup_vs_plain_pipeline",
}


def test_every_figure_of_the_issue_has_contenders():
    rows = {(f.group, f.name): (f.numerator, f.denominator) for f in figures.FIGURES}
    assert {name for _, name in rows} >= ISSUE_NAMES
    for (group, name), pair in rows.items():
        assert set(pair) <= {row.label for row in figures.GROUPS[group]}, name
    for (group, size), case in figures.CASES.items():
        assert case.size == size
        assert {entry.contender for entry in figures.entries(group, case)} <= set(CONTENDERS)


def test_ratios_are_taken_round_by_round():
    case = Case(size="tiny", batch=1)
    measured = {
        "ours": Measured(case=case, baseline=100, seconds=[1.0, 4.0], memory=[200, 300]),
        "plain": Measured(case=case, baseline=50, seconds=[1.0, 2.0], memory=[100, 100]),
        "ours_pool12": Measured(case=case, baseline=100, seconds=[1.0, 1.0], memory=[200, 200]),
    }
    ratios = figures.ratios("selection", measured)
    assert ratios["selection_time_vs_plain"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert ratios["selection_memory_growth_12_to_96"] == {"min": 0.0, "median": 0.25, "max": 0.5}
    assert "selection_speedup_vs_functorch" not in ratios  # it failed


@pytest.mark.long
def test_a_group_writes_finite_figures_and_contenders_agree(tmp_path):
    benchmark.main(
        str(tmp_path), groups="selection", quick=True, contenders="ours,opacus_hooks,plain"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == {}
    names = (
        "selection_time_vs_plain",
        "selection_speedup_vs_opacus_hooks",
        "selection_memory_vs_plain",
    )
    for name in names:
        for value in results[f"tiny/{name}"].values():
            assert math.isfinite(value) and value > 0
    # ours lies on a grid of 2**-20: that is 1.6e-4 of the smallest matrix's sum here
    assert results["agreement"]["selection/tiny/opacus_hooks"]["max_relative"] < 3e-4
    ours = results["absolute"]["selection/tiny/ours"]
    assert (
        ours["images_per_s"] > 0
        and ours["gflop_per_step"] > 0
        and ours["peak_mib"] >= ours["mib_before_first_step"]
    )
    assert "tiny/selection_time_vs_plain" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "ratios.png").stat().st_size > 0


@pytest.mark.long
def test_a_contender_that_fails_is_named_and_the_others_go_on():
    case = Case(size="tiny", batch=1)
    broken = Entry(
        label="broken",
        contender="gemm",
        case=Case(size="tiny", batch=1, dtype="float33"),
        tuned=False,
    )
    measured, failures = measure(
        [Entry(label="gemm", contender="gemm", case=case, tuned=True), broken],
        1,
        log=lambda text: None,
    )
    assert list(measured) == ["gemm"] and len(measured["gemm"].seconds) == 1
    assert "float33" in failures["broken"]


def test_unknown_group_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="groups"):
        benchmark.main(str(tmp_path), groups="speed")
