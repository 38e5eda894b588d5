"""Hours on a cluster follow from measured costs.

Table 12 comes back, devices share the work, one's own files serve.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sapf_ray.config import RunConfig, from_dict
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.cluster import estimate_run, open_cluster
from sapf_ray.estimate.costs import UNITS, Measured, sd_gflop, shipped_costs, work
from sapf_ray.estimate.measurements import read_costs
from sapf_ray.estimate.result import RunEstimate
from sapf_ray.paper.tables import paper_setting, paper_table
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan, make_plan
from sapf_ray.runs.directory import RunDirectory
from tests.commands import call
from tests.models.test_published_shapes import SD_1_5

PLAN = (
    "plan",
    "--data.n_records",
    "45000",
    "--data.source",
    "cifar10",
    "--privacy.accountant",
    "rdp",
)
SD = ("--model.path", "sd-v1-5", "--model.resolution", "256")


def paper_run(**overrides: Any) -> RunConfig:
    """The paper's CIFAR-10 run, which is what the defaults are, without a search for its noise."""
    return from_dict(
        {
            "model": {"path": "sd-v1-5", "resolution": 256},
            "data": {"source": "cifar10"},
            "privacy": {"non_private": True},
            **overrides,
        }
    )


def plan_of(config: RunConfig) -> PrivacyPlan:
    return make_plan(config, 45_000)


def hours_of(spec: str, config: RunConfig, **options: Any) -> RunEstimate:
    cluster = open_cluster(spec, config, **options)
    assert cluster is not None
    return estimate_run(config, plan_of(config), cluster=cluster)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("DP-SAPF", {}),
        ("DP-LoRA", {"saliency": {"ratio": 1.0}}),
        ("DP-LDM", {"saliency": {"ratio": 1.0}, "finetune": {"adapter": "direct"}}),
        ("DP-Finetune", {"saliency": {"ratio": 1.0}, "finetune": {"adapter": "full"}}),
    ],
)
def test_four_a6000_give_back_table_12(method, overrides):
    config = paper_run(**overrides)
    setting = paper_setting("cifar10")
    assert (config.finetune.steps, config.finetune.batch_size, setting.n_train) == (
        setting.steps,
        setting.batch_size,
        45_000,
    )
    stages = hours_of("4xa6000", config).stages
    for row in paper_table("table12"):
        if row["method"] == method and row["hours"]:
            stage = stages[{"select": "selection"}.get(row["stage"], row["stage"])]
            assert (
                stage.hours == pytest.approx(row["hours"], rel=1e-12)
                and stage.memory_gb == row["memory_gb"]
            )
            assert stage.seconds_per_unit == pytest.approx(row["hours"] * 4 * 3600 / stage.units)


def test_devices_share_the_work_until_it_has_no_more_pieces():
    config = paper_run()
    four, eight, thousand = (hours_of(f"{k}xa6000", config) for k in (4, 8, 1000))
    for name in ("selection", "finetune", "synthesis"):
        assert eight.stages[name].hours == pytest.approx(four.stages[name].hours / 2)
    assert thousand.stages["synthesis"].hours == pytest.approx(1.9 * 4 / (60_000 / 100))
    assert thousand.stages["selection"].devices == 88  # ceil(45,000 / 512)
    assert "selection 88, synthesis 600" in " ".join(thousand.notes)
    assert "upper bound" in " ".join(eight.notes) and "upper bound" not in " ".join(four.notes)


def test_work_follows_the_config():
    usual = work(paper_run(), plan_of(paper_run()))
    config = paper_run(
        saliency={"sample_rate": 0.5, "score": "force", "rounds": 3},
        finetune={"steps": 10, "draws_per_record": 4},
        synthesis={"n_images": 100, "steps": 10, "guidance_scale": 1.0},
        evaluation={"epochs": 2, "classifiers": ["wrn", "resnet"]},
    )
    assert usual == {
        "latents": 45_000,
        "selection": 45_000,
        "finetune": 4_096_000,
        "synthesis": 3_000_000,
        "evaluation": 1_200_000,
    }
    assert work(config, plan_of(config)) == {
        "latents": 45_000,
        "selection": 67_500,
        "finetune": 10 * 4096 * 4,
        "synthesis": 1_000,
        "evaluation": 400,
    }
    public = paper_run(finetune={"steps": 0}, evaluation={"enabled": False})
    assert list(work(public, plan_of(public))) == ["synthesis"]
    evolved = paper_run(
        finetune={"steps": 0},
        evolution={"enabled": True, "iterations": 2, "population": 5, "lookahead": 1},
    )
    plan = replace(
        plan_of(public),
        evolution=StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=2, share=None),
    )
    assert work(evolved, plan)["evolution"] == (60_000 + 10 * 2 * 5 * 2) * 50
    assert set(usual) | {"evolution", "grounding"} == set(UNITS)


def test_price_is_of_all_devices_all_the_time():
    config = paper_run()
    data = hours_of("8xa6000", config, price=1.25).to_dict()
    assert data["cost"] == pytest.approx(8 * 3.0 * 1.25) and data["device_hours"] == pytest.approx(
        24
    )
    assert (
        data["stages"]["finetune"]["cost"] == pytest.approx(1.25 * 3.5 * 4)
        and data["stages"]["latents"]["cost"] is None
    )
    assert hours_of("8xa6000", config).to_dict()["cost"] is None


def test_a_model_of_another_size_is_refused_and_an_unknown_one_noted():
    with pytest.raises(
        ConfigError, match=r"model\.path = 'glyphs-tiny': the costs were measured on sd-v1-5"
    ):
        open_cluster("4xa6000", RunConfig())
    assert not any(
        "same size" in note
        for note in hours_of(
            "4xa6000", paper_run(model={"path": "realistic-v6", "resolution": 256})
        ).notes
    )
    assert any(
        "/models/mine unless it has the same size" in note
        for note in hours_of("4xa6000", paper_run(model={"path": "/models/mine"})).notes
    )


def test_the_arithmetic_at_any_resolution_is_that_of_the_published_unet():
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(SD_1_5)
        for side in (64, 128, 256, 384, 512, 768):
            with FlopCounterMode(display=False) as counter:
                unet(
                    torch.zeros(1, 4, side // 8, side // 8), torch.zeros(1), torch.zeros(1, 77, 768)
                )
            assert counter.get_total_flops() / 1e9 == pytest.approx(sd_gflop(side), rel=1e-3)


def test_hours_follow_the_resolution_that_is_requested():
    paper = hours_of("4xa6000", paper_run())
    assert not any("times the arithmetic" in note for note in paper.notes)
    native = hours_of("4xa6000", paper_run(model={"path": "sd-v1-5"}))
    more = sd_gflop(512) / sd_gflop(256)
    for name in ("selection", "finetune", "synthesis"):
        assert native.stages[name].hours == pytest.approx(more * paper.stages[name].hours)
    assert any("requested are 512 px, 4.5 times the arithmetic" in note for note in native.notes)
    larger = hours_of("4xa6000", paper_run(synthesis={"resolution": 512}))
    assert larger.stages["synthesis"].hours == native.stages["synthesis"].hours
    assert larger.stages["finetune"].hours == paper.stages["finetune"].hours
    unknown = hours_of("4xa6000", paper_run(model={"path": "/models/mine"}))
    assert any("is read by the run (model.resolution sets it)" in note for note in unknown.notes)
    assert unknown.hours == paper.hours


def finished_run(root: Path, **metrics: Any) -> Path:
    config = from_dict(
        {
            "data": {"source": "digits"},
            "privacy": {"non_private": True},
            "synthesis": {"n_images": 100, "steps": 5},
            "finetune": {
                "steps": 20,
                "batch_size": 50,
                "num_workers": 2,
                "gpus_per_worker": 1.0,
                "adapter": "full",
            },
            "saliency": {"ratio": 1.0},
        }
    )
    run = RunDirectory(root / "run")
    run.claim(config)
    run.release()
    run.write_json(run.plan, make_plan(config, 200).to_dict())
    run.write_json(
        run.metrics,
        {"seconds": {"plan": 1.0, "latents": 4.0, "finetune": 60.0, "synthesis": 10.0}, **metrics},
    )
    return run.metrics


def test_a_finished_run_predicts_itself_and_larger_ones(tmp_path):
    path = finished_run(
        tmp_path,
        peak_gpu_memory_mb={"finetune": 2e4},
        orchestration={"latents": 3.0, "finetune": 20.0, "outside_stages": 6.0, "total_share": 0.3},
    )
    config = RunDirectory(path.parent).read_config()
    plan = make_plan(config, 200)
    cluster = open_cluster("2xmine", config, costs_file=str(path))
    same = estimate_run(config, plan, cluster=cluster)
    seconds = {
        name: 3600 * stage.hours for name, stage in same.stages.items() if stage.hours is not None
    }
    assert seconds == pytest.approx({"latents": 4, "finetune": 60, "synthesis": 10})
    assert 3600 * same.hours == pytest.approx(80) and same.stages[
        "finetune"
    ].memory_gb == pytest.approx(1e4 * 2**20 / 1e9)
    longer = replace(config, finetune=replace(config.finetune, steps=200))
    twice = estimate_run(longer, make_plan(longer, 200), cluster=replace(cluster, count=4))
    assert 3600 * twice.stages["finetune"].hours == pytest.approx(20 + 40 * 10 / 2), (
        "start-up stays, work is shared"
    )
    assert any("evaluation" in note and "not measured" in note for note in twice.notes)


def bench_file(root: Path, **more: Any) -> Path:
    def row(images: int, seconds: float, **extra: Any) -> dict[str, Any]:
        return {
            "device": "cpu",
            "images_per_step": images,
            "seconds": {"min": 0, "median": seconds, "max": 9},
            "peak_mib": 500,
            "dtype": "float32",
            **extra,
        }

    path = root / "results.json"
    path.write_text(
        json.dumps(
            {
                "machine": {"device": "Some CPU", "threads": 1},
                "agreement": {},
                "failures": {},
                "workers2_speedup_finetune": {"min": 1.5, "median": 1.6, "max": 1.7},
                "absolute": {
                    "gemm_gflop_per_s": 50.0,
                    "selection/embedded/ours": row(64, 0.128),
                    "selection/embedded/plain": row(64, 9.0),
                    "lora/embedded/ours": row(64, 0.32),
                    "full/embedded/ours": row(32, 0.32),
                    "synthesis/embedded/ours": row(100, 4.0, passes_per_image=40),
                    "selection/sd/ours": row(8, 5.0),
                    **more,
                },
            }
        )
    )
    return path


def test_the_benchmark_s_rates_of_the_runs_model(tmp_path):
    config = from_dict(
        {
            "data": {"source": "digits"},
            "privacy": {"non_private": True},
            "finetune": {"batch_size": 100},
        }
    )
    costs = read_costs(str(bench_file(tmp_path)), config)
    found = {stage: rows[0].seconds / rows[0].units for stage, rows in costs.stages.items()}
    assert found == {
        "selection": pytest.approx(0.002),
        "finetune": pytest.approx(0.005),
        "synthesis": pytest.approx(0.001),
    }
    full = replace(
        config,
        finetune=replace(config.finetune, adapter="full"),
        saliency=replace(config.saliency, ratio=1.0),
    )
    assert costs.of("finetune", full) == Measured(
        seconds=0.32, units=32, memory_gb=500 * 2**20 / 1e9, adapter="full", ratio=1.0
    )
    plan = make_plan(config, 1000)
    one, two = (
        estimate_run(
            config,
            plan,
            cluster=open_cluster(f"{k}xcore", config, costs_file=str(tmp_path / "results.json")),
        ).stages
        for k in (1, 2)
    )
    assert one["finetune"].hours / two["finetune"].hours == pytest.approx(1.6), (
        "the file's own figure for two workers"
    )
    assert one["synthesis"].hours / two["synthesis"].hours == pytest.approx(2)
    with pytest.raises(
        ConfigError, match=r"measured nothing on model\.path sd-v1-5; it has embedded"
    ):
        read_costs(str(tmp_path / "results.json"), paper_run())
    bench_file(
        tmp_path,
        **{
            "synthesis/embedded/ours": {
                "seconds": {"median": 1.0},
                "images_per_step": 5,
                "peak_mib": 1,
            }
        },
    )
    assert "synthesis" not in read_costs(str(tmp_path / "results.json"), config).stages, (
        "an older file has no number of passes"
    )


def test_an_adapter_that_was_not_measured_is_scaled_by_table_12():
    config = from_dict({"finetune": {"adapter": "full"}, "saliency": {"ratio": 1.0}})
    lora, full = (shipped_costs()["cpu2"].of("finetune", c) for c in (RunConfig(), config))
    assert full.seconds / lora.seconds == pytest.approx(8.0 / 3.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "4xfoo"], "--cluster = '4xfoo': device must be one of a6000, cpu2"),
        (["--cluster", "0xa6000"], "--cluster = '0xa6000': must have at least 1 device"),
        (["--cluster", "a6000"], "--cluster = 'a6000': must be COUNTxDEVICE"),
        (["--cluster=-1xa6000"], "must be COUNTxDEVICE"),
        (
            ["--cluster", "4xa6000", "--cluster_price", "-1"],
            "--cluster_price = -1.0: must be a finite number",
        ),
        (["--cluster", "4xa6000", "--cluster_price", "cheap"], "cluster_price = 'cheap'"),
        (["--cluster_price", "1"], "--cluster_price = 1.0: needs --cluster"),
        (["--cluster_costs", "x.json"], "--cluster_costs = 'x.json': needs --cluster"),
        (
            ["--cluster", "4xmine", "--cluster_costs", "/no/such.json"],
            "'/no/such.json': cannot be read",
        ),
        (["--cluster", "4xmine", "--cluster_costs", "BROKEN"], "is no JSON file"),
        (
            ["--cluster", "4xmine", "--cluster_costs", "OTHER"],
            "must be the results.json of `make bench` or the metrics.json",
        ),
        (["--cluster", "4xmine", "--cluster_costs", "DAMAGED"], "is damaged"),
        (["--cluster", "4xmine", "--cluster_costs", "ALONE"], "plan.json is not beside it"),
        (
            ["--cluster", "4xa6000", "--model.path", "glyphs-tiny"],
            "model.path = 'glyphs-tiny': the costs were measured on sd-v1-5",
        ),
    ],
)
def test_what_cannot_be_estimated_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, words):
    files = {
        "BROKEN": "{",
        "OTHER": "[1]",
        "DAMAGED": '{"absolute": {"lora/embedded/ours": 3}}',
        "ALONE": '{"seconds": {}}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments = [str(tmp_path / word) if word in files else word for word in arguments]
    code, out, err = call(capsys, *PLAN, *SD, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_json_has_the_cluster_only_when_asked_and_the_config_section_stays(capsys, monkeypatch):
    code, plain, _ = call(capsys, *PLAN, *SD, "--json", "--cluster.address", "auto")
    arguments = (
        "--json",
        "--cluster",
        "4xa6000",
        "--cluster.address",
        "auto",
        "--cluster.num_cpus=2",
        "--cluster_price",
        "2",
    )
    second, asked, _ = call(capsys, *PLAN, *SD, *arguments)
    assert code == second == 0
    found = json.loads(asked)
    cluster = found.pop("cluster")
    assert found == json.loads(plain)
    assert [
        round(cluster["stages"][name]["hours"], 9)
        for name in ("selection", "finetune", "synthesis")
    ] == [0.6, 3.5, 1.9]
    assert cluster["hours"] == pytest.approx(6.0) and cluster["cost"] == pytest.approx(48.0)
    assert cluster["devices"] == 4
    _, text, _ = call(capsys, *PLAN, *SD, "--cluster=4xa6000")
    assert "3.5 h" in text and "Privacy plan" in text
