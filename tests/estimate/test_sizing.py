"""What `sapf init` chooses: a run that fits the images, the machine and the minutes."""

from __future__ import annotations

import pytest

from sapf_ray.config import from_dict, nest
from sapf_ray.config.yaml_text import parse_yaml
from sapf_ray.errors import ConfigError
from sapf_ray.estimate.arithmetic import GLYPHS_GFLOP, forward_gflop, size_factor
from sapf_ray.estimate.local import forecast
from sapf_ray.estimate.machine import Gpu, Machine, core_speed, usable_cores, usable_memory_gb
from sapf_ray.estimate.sizing import Images, Sizing, cached_model, choose
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.planner import make_plan
from sapf_ray.report.sizing import commented_yaml, plan_lines

LAPTOP = Machine(cores=2, memory_gb=16)
SERVER = Machine(cores=8, memory_gb=64, gpus=(Gpu(name="A100", memory_gb=40.0),))
FAST = {"privacy.non_private": True}  # no noise to be found, which takes seconds


def chosen(n_train: int, machine: Machine = LAPTOP, **more) -> Sizing:
    images = Images(n_train=n_train, n_classes=10, file_bytes=20_000 * n_train)
    more.setdefault("given", FAST)
    return choose(images, machine, **more)


@pytest.mark.parametrize("n_train", [10, 160, 1_297, 4_000, 16_000])
def test_any_folder_takes_minutes_and_keeps_its_batch_below_its_images(n_train):
    sizing = chosen(n_train)
    finetune = sizing.config.finetune
    assert sizing.forecast.total <= 1.05 * 600 and not sizing.forecast.unknown
    assert 1 <= finetune.batch_size <= max(8, n_train // 2)
    assert sizing.config.synthesis.n_images >= 1_000
    assert sizing.config.model.path == "glyphs-tiny"


def test_more_minutes_and_more_cores_are_more_training():
    few, many = chosen(16_000, minutes=5), chosen(16_000, minutes=15)
    assert few.config.finetune.batch_size < many.config.finetune.batch_size
    eight = chosen(16_000, Machine(cores=8, memory_gb=16), minutes=5)
    assert few.config.finetune.batch_size < eight.config.finetune.batch_size
    slow = chosen(16_000, Machine(cores=2, memory_gb=16, speed=0.5), minutes=5)
    assert slow.config.finetune.batch_size < few.config.finetune.batch_size
    assert any("more than 1 minutes" in note for note in chosen(16_000, minutes=1).notes)


def test_groups_are_planned_for_as_units_with_a_draw_for_each_image():
    images = Images(n_train=1_300, n_classes=10, n_groups=260)
    sizing = choose(images, LAPTOP, given={**FAST, "data.groups": "column:writer"})
    finetune = sizing.config.finetune
    assert sizing.plan.n_records == 260 and sizing.plan.unit == "group"
    assert 1 <= finetune.batch_size <= 130
    assert finetune.draws_per_record == sizing.config.saliency.draws_per_record == 5
    assert "expected groups a step" in commented_yaml(sizing, LAPTOP, command="sapf run")
    assert sizing.forecast.total <= 1.05 * 600


def test_what_the_user_gives_is_kept_and_the_file_says_why():
    sizing = chosen(
        500, given={"privacy.epsilon": 3.0, "data.path": "/a b/ü#", "finetune.steps": 7}
    )
    text = commented_yaml(sizing, LAPTOP, command="sapf run --config run.yaml --out runs/x")
    assert from_dict(parse_yaml(text)) == sizing.config
    assert sizing.config.privacy.epsilon == 3 and sizing.plan.composed_epsilon <= 3
    assert sizing.config.finetune.steps == 7
    assert all(
        "#" in line for line in text.splitlines() if line.startswith("  ") and "_end" not in line
    )
    assert max(map(len, text.splitlines())) <= 120


def test_stable_diffusion_where_a_gpu_and_a_cached_copy_are():
    row = PUBLIC_MODELS["sd-v1-5"]
    sizing = chosen(2_000, SERVER, cached=row)
    config = sizing.config
    assert config.model.path == "sd-v1-5" and config.model.dtype == "bfloat16"
    assert config.finetune.gpus_per_worker == config.synthesis.gpus_per_actor == 1
    assert "A6000" in sizing.forecast.words()
    without = chosen(2_000, SERVER)
    assert without.config.model.path == "glyphs-tiny"
    assert any("hf download" in note for note in without.notes)
    assert chosen(2_000, cached=row).config.model.path == "glyphs-tiny"


def test_a_model_counts_as_cached_only_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cached_model() is None
    folder = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5/snapshots/abc"
    for name in ("unet", "vae", "text_encoder"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()
    (folder / "model_index.json").write_text(
        '{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "text_encoder": ["t", "C"]}'
    )
    assert cached_model().name == "sd-v1-5"
    (folder / "unet/model.safetensors").unlink()
    assert cached_model() is None


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="holds 9 images to learn from; at least 10"):
        chosen(9)


def test_the_papers_defaults_are_called_long_on_cores_before_they_start():
    config = from_dict({"privacy": {"non_private": True}})
    plan = make_plan(config, 45_000)
    lines = list(plan_lines(config, plan, forecast(config, plan, machine=LAPTOP)))
    assert "1,000 steps x 4,096 images, then 60,000 synthetic images" in lines[1]
    assert lines[-1].startswith("warning: ") and "hours without a GPU" in lines[-1]
    assert "`sapf init PHOTOS/`" in lines[-1] and "--preset digits" in lines[-1]
    small = chosen(500)
    assert not any(
        "warning" in line for line in plan_lines(small.config, small.plan, small.forecast)
    )


def test_the_plan_shows_epsilon_delta_and_noise():
    config = from_dict(
        nest({"finetune.batch_size": 100, "finetune.steps": 10, "privacy.accountant": "rdp"})
    )
    plan = make_plan(config, 500)
    budget, work, time = plan_lines(config, plan, forecast(config, plan, machine=LAPTOP))
    assert f"ε = 10 at δ = {plan.delta:.3g}" in budget
    assert f"finetune {plan.finetune.noise_multiplier:.4g}" in budget
    assert "10 steps x 100 images" in work
    for stage in ("start", "latents", "selection", "finetune", "synthesis", "evaluation"):
        assert stage in time


def test_arithmetic_of_a_model_is_counted_without_computing_it(tiny_pipeline):
    assert forward_gflop(PublicModel.open(from_dict({}).model)) == pytest.approx(
        GLYPHS_GFLOP, rel=0.01
    )
    labels = PublicModel.open(from_dict({"model": {"path": "glyphs-dit-tiny"}}).model)
    assert 0 < size_factor(labels) < 1
    tiny = PublicModel.open(from_dict({"model": {"path": str(tiny_pipeline)}}).model)
    assert 0 < size_factor(tiny) < 0.2


def test_this_machine_is_seen():
    assert usable_cores() >= 1 and usable_memory_gb() > 0.5 and core_speed() > 0
