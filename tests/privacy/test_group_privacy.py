"""What an image-level plan means for a person with k images."""

from __future__ import annotations

import json
import math

import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq
from scipy.stats import binom, norm

from sapf_ray.cli import main
from sapf_ray.config import from_dict
from sapf_ray.errors import ConfigError
from sapf_ray.privacy import group_privacy
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.group_privacy import person_epsilon, person_report
from sapf_ray.privacy.planner import make_plan

N = 1000


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Ten times the width: a bound still, looser by less than a percent, in a tenth of the time."""
    monkeypatch.setattr(group_privacy, "INTERVAL", 1e-2)


def plan_of(batch_size: int, steps: int, **sections):
    finetune = {"steps": steps, "batch_size": batch_size}
    privacy = {"epsilon": 4.0, "accountant": "rdp"}
    config = {"privacy": privacy, "saliency": {"ratio": 1.0}, "finetune": finetune}
    return make_plan(from_dict({**config, **sections}), N)


def test_a_person_of_one_image_has_the_plans_own_epsilon():
    plan = plan_of(100, 5)
    assert plan.finetune is not None
    own = compose_epsilon(plan.finetune.charges(), plan.delta, accountant="pld")
    assert person_epsilon(plan, 1) == pytest.approx(own, rel=0.01)


def test_full_passes_are_gaussian_releases_of_k_times_the_sensitivity():
    plan = plan_of(N, 10)
    assert plan.finetune is not None
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(GaussianDpEvent(plan.finetune.noise_multiplier / 3), 10)
    assert person_epsilon(plan, 3) == pytest.approx(accountant.get_epsilon(plan.delta), rel=0.01)


def test_one_sampled_step_is_the_mixtures_hockey_stick():
    """Against the curve by the mixture's own distribution function, in the worse direction."""
    plan = plan_of(200, 1, privacy={"epsilon": 1.0, "accountant": "rdp"})
    assert plan.finetune is not None
    sigma, k = plan.finetune.noise_multiplier, 2
    weights = binom.pmf(range(k + 1), k, 0.2)

    def delta(epsilon: float) -> float:
        def loss(x: float) -> float:  # log of the densities' ratio, rising in x
            terms = [w * math.exp((j * x - j * j / 2) / sigma**2) for j, w in enumerate(weights)]
            return math.log(sum(terms)) - epsilon

        x = brentq(loss, -50, 50)
        above = sum(w * norm.sf((x - j) / sigma) for j, w in enumerate(weights))
        return above - math.exp(epsilon) * norm.sf(x / sigma)

    epsilon = person_epsilon(plan, k)
    assert delta(epsilon) == pytest.approx(plan.delta, rel=0.1)
    assert epsilon > 1.5 * plan.composed_epsilon


def test_what_has_no_such_number_is_refused_and_without_noise_it_is_infinite():
    groups = plan_of(100, 5, data={"groups": "published"})
    with pytest.raises(ConfigError, match="--images_per_person = 3: must be left out"):
        person_report(groups, 3)
    bare = plan_of(100, 5, privacy={"non_private": True})
    assert person_report(bare, 3) == {"person": {"images": 3, "epsilon": "inf"}}


def test_sapf_plan_says_it(capsys):
    words = ["plan", "--json", "--data.n_records", str(N), "--saliency.ratio", "1"]
    words += ["--finetune.steps", "5", "--finetune.batch_size", "100"]
    words += ["--privacy.accountant", "rdp", "--grounding.remedies", "none"]
    assert main([*words, "--images_per_person", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["person"]["images"] == 2
    assert found["person"]["epsilon"] > found["composed_epsilon"]
