"""An evolution's plan: T histograms on the full pass, of sensitivity 1, with the least noise that
fits.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from sapf_ray.config import RunConfig, from_dict
from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.planner import (
    PrivacyPlan,
    evolution_stage,
    make_plan,
    plan_events,
)
from sapf_ray.report.tables import plan_table


def noise_for(epsilon: float, iterations: int, accountant: str) -> float:
    return evolution_stage(
        epsilon, 1e-5, iterations=iterations, accountant=accountant
    ).noise_multiplier


def config_of(**privacy) -> RunConfig:
    return from_dict(
        {
            "evolution": {"enabled": True, "iterations": 5},
            "finetune": {"steps": 0},
            "privacy": {"epsilon": 2.0, "accountant": "rdp", **privacy},
        }
    )


def table_of(plan: PrivacyPlan) -> str:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(plan_table(plan))
    return console.export_text()


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("epsilon", "iterations"), [(1.0, 7), (10.0, 17)])
def test_t_histograms_cost_what_one_with_less_noise_costs(accountant, epsilon, iterations):
    noise = noise_for(epsilon, iterations, accountant)
    together = compose_epsilon([(gaussian_event(noise), iterations)], 1e-5, accountant=accountant)
    one = compose_epsilon(
        gaussian_event(noise / math.sqrt(iterations)), 1e-5, accountant=accountant
    )
    assert together == pytest.approx(one, rel=1e-3)
    assert 0.998 * epsilon < together <= epsilon


def test_the_gaussian_bound_of_the_literature():
    """Balle & Wang 2018: sigma = 3.7306 is enough for (1, 1e-5), and no less is."""
    assert noise_for(1.0, 1, "pld") == pytest.approx(3.7306, rel=1e-3)


def test_the_plan_of_a_run_is_its_histograms_and_nothing_else():
    plan = make_plan(config_of(), 100)  # fewer records than finetune.batch_size, which is unused
    assert (plan.selection, plan.finetune, plan.steps, plan.batch_size, plan.sample_rate) == (
        None,
        None,
        0,
        0,
        0,
    )
    assert (
        plan.evolution == evolution_stage(2.0, plan.delta, iterations=5, accountant="rdp")
        and plan.evolution.share == 1
    )
    assert plan_events(plan) == [("evolution", gaussian_event(plan.evolution.noise_multiplier), 5)]
    assert (
        compose_epsilon([(e, n) for _, e, n in plan_events(plan)], plan.delta, accountant="rdp")
        == plan.composed_epsilon
    )
    assert 0.998 * 2 < plan.composed_epsilon <= 2 and plan.reads_images
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    printed = table_of(plan)
    assert (
        "evolution" in printed
        and f"{plan.evolution.noise_multiplier:.4g}" in printed
        and "100.00%" in printed
    )
    assert "fine-tuning" not in printed and "batch size" not in printed


def test_without_noise_the_plan_is_infinite_and_says_so():
    plan = make_plan(config_of(non_private=True), 100)
    assert (
        plan.evolution.noise_multiplier == 0
        and plan.evolution.share is None
        and plan.composed_epsilon == math.inf
    )
    assert plan.to_dict()["composed_epsilon"] == "inf" and "NOT PRIVATE" in table_of(plan)


def test_what_reads_no_image_still_says_so():
    config = config_of()
    plan = make_plan(
        dataclasses.replace(config, evolution=dataclasses.replace(config.evolution, enabled=False)),
        100,
    )
    assert (
        not plan.reads_images
        and plan.composed_epsilon == 0
        and "reads no sensitive image" in table_of(plan)
    )


def test_an_epsilon_out_of_reach_is_said():
    with pytest.raises(ConfigError, match=r"evolution\.iterations") as error:
        evolution_stage(1e-6, 1e-12, iterations=10**6, accountant="rdp")
    assert error.value.field == "privacy.epsilon" and "\n" not in str(error.value)
