"""Selection mechanisms: distributions, privacy of neighbours, accounting; broken twins are
rejected.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare, norm

from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig, SaliencyConfig, from_dict
from sapf_ray.errors import ConfigError
from sapf_ray.privacy import release
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import approximate_event, describe_event, gaussian_event
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.noise import add_gumbel, add_laplace
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan, make_plan, plan_events
from sapf_ray.privacy.release import Releaser, draw_epsilon
from sapf_ray.saliency.mechanisms import MECHANISMS, Question
from sapf_ray.saliency.scores import SCORES, random_values, top_n

KEY = NoiseKey(bytes(range(32)))
BOUND, DRAWS = 0.5, 2000
SCORE = SCORES["per_sample_norm"]


def planned(mechanism: str, noise: float, delta: float = 0.0) -> PrivacyPlan:
    stage = StagePlan(
        noise_multiplier=noise,
        sample_rate=1.0,
        count=1,
        share=None,
        mechanism=mechanism,
        delta=delta,
    )
    plan = plan_of()
    return dataclasses.replace(plan, selection=stage, epsilon=math.inf, non_private=noise == 0)


class NoLedger:
    """Pays nothing, so that thousands of draws need no file."""

    def record(self, *arguments) -> None:
        pass

    def noise_ids(self, release: str) -> set[str]:
        return set()


def choose(mechanism: str, utility, noise: float, n: int, i: int, delta: float = 0.0):
    values = torch.tensor(utility, dtype=torch.float64)
    releaser = Releaser(key=KEY.bind(i), ledger=NoLedger(), plan=planned(mechanism, noise, delta))
    question = Question(
        name="selection",
        total=ExactSum.rounded([values], BOUND),
        n=n,
        score=SCORE,
        releaser=releaser,
        seed=7,
    )
    choice = MECHANISMS[mechanism].choose(question)
    return choice, tuple(
        int(name) for name in top_n([str(j) for j in range(len(values))], choice.values, n=n)
    )


def peeling_probability(utility, kept, epsilon: float) -> float:
    """Of drawing this set one by one without replacement, weight exp(epsilon u / BOUND)."""
    weight = [math.exp(epsilon * u / BOUND) for u in utility]
    total = 0.0
    for order in itertools.permutations(kept):
        left, probability = sum(weight), 1.0
        for j in order:
            probability *= weight[j] / left
            left -= weight[j]
        total += probability
    return total


def check_exponential() -> None:
    """Frequencies of the kept sets are those of peeling, at the 1e-6 level."""
    utility, noise, n = [0.0, 0.4, 0.9, 1.1], 0.8, 2
    counts = dict.fromkeys(itertools.combinations(range(4), n), 0)
    for i in range(DRAWS):
        counts[choose("exponential", utility, noise, n, i)[1]] += 1
    expected = [
        DRAWS * peeling_probability(utility, kept, draw_epsilon(noise, n)) for kept in counts
    ]
    assert sum(expected) == pytest.approx(DRAWS)
    assert chisquare(list(counts.values()), expected).pvalue > 1e-6


def check_test() -> None:
    """At a gap of C, the largest an unstable top-k has, the test passes with probability delta."""
    passes = sum(
        bool(choose("propose_test_release", [0.0, 1.0, 1.0 + BOUND], 2.0, 1, i, 0.1)[0].passed)
        for i in range(DRAWS)
    )
    assert binomtest(passes, DRAWS, 0.1).pvalue > 1e-6


def test_exponential_draws_as_peeling_does():
    check_exponential()


@pytest.mark.parametrize(
    "twin",
    [
        lambda total, scale, stream: total,
        lambda total, scale, stream: add_gumbel(total, scale / 2, stream),
        lambda total, scale, stream: add_gumbel(total, scale / BOUND, stream),  # without C
        lambda total, scale, stream: add_gumbel(total, 2 * scale, stream),
    ],
)
def test_broken_exponential_twins_are_rejected(twin, monkeypatch):
    monkeypatch.setattr(release.noise, "add_gumbel", twin)
    with pytest.raises(AssertionError):
        check_exponential()


def test_unstable_top_k_passes_with_probability_delta():
    check_test()


@pytest.mark.parametrize(
    "twin",
    [
        lambda total, scale, stream: total,
        lambda total, scale, stream: add_laplace(total, scale / 2, stream),
        lambda total, scale, stream: add_laplace(total, 2 * scale, stream),
    ],
)
def test_broken_test_twins_are_rejected(twin, monkeypatch):
    monkeypatch.setattr(release.noise, "add_laplace", twin)
    with pytest.raises(AssertionError):
        check_test()


RECORDS = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), min_size=3, max_size=8)


@settings(max_examples=100, deadline=None)
@given(records=RECORDS, epsilon=st.floats(0.05, 3))
def test_one_record_changes_a_draw_by_at_most_epsilon(records, epsilon):
    """The proof of the exponential mechanism: no factor 1/2 is missing for non-negative
    contributions.
    """
    utility = [u for u, _ in records]
    joined = [u + v * BOUND for u, v in records]
    for j in range(len(records)):
        p, q = (peeling_probability(values, (j,), epsilon) for values in (utility, joined))
        assert abs(math.log(p / q)) <= epsilon + 1e-9


@settings(max_examples=200, deadline=None)
@given(records=RECORDS, n=st.integers(1, 2))
def test_gap_moves_by_at_most_the_bound_and_an_unstable_top_k_has_a_small_one(records, n):
    """The two facts that the proof of propose-test-release rests on."""
    utility = torch.tensor([u for u, _ in records], dtype=torch.float64)
    joined = utility + BOUND * torch.tensor([v for _, v in records], dtype=torch.float64)
    names = [str(j) for j in range(len(records))]
    gaps = [
        float(x.sort(descending=True).values[n - 1] - x.sort(descending=True).values[n])
        for x in (utility, joined)
    ]
    assert abs(gaps[0] - gaps[1]) <= BOUND + 1e-9
    if top_n(names, utility, n=n) != top_n(names, joined, n=n):
        assert max(gaps) <= BOUND + 1e-9


def test_stable_top_k_is_released_exactly_and_a_failed_test_gives_public_random_matrices():
    passed, kept = choose("propose_test_release", [0.0, 100.0, 3.0, 101.0], 2.0, 2, 0, 1e-5)
    assert passed.passed and not passed.released and kept == (1, 3)
    failed, kept = choose("propose_test_release", [0.0, 3.1, 3.0, 101.0], 2.0, 2, 0, 1e-5)
    assert failed.passed is False and torch.equal(failed.values, random_values(4, 7))
    assert choose("propose_test_release", [0.0, 1.0], 2.0, 2, 0, 1e-5)[1] == (0, 1)


def test_draws_released_by_exponential_are_names_not_values():
    assert not choose("exponential", [0.0, 1.0], 1.0, 1, 0)[0].released
    assert choose("exponential", [0.0, 1.0], 0.0, 1, 0)[0].released  # not private


@pytest.mark.parametrize("noise,n", [(25.0, 29), (2.0, 5), (1.0, 1)])
def test_exponential_draws_cost_no_more_than_the_gaussian_they_are_priced_as(noise, n):
    """n randomised responses, the worst epsilon-DP mechanisms, composed numerically."""
    epsilon, interval = draw_epsilon(noise, n), 1e-5 if noise > 5 else 1e-4
    assert norm.cdf(-1 / (2 * noise * math.sqrt(n))) == pytest.approx(1 / (1 + math.exp(epsilon)))
    deltas = (1e-6, 1e-3, 0.05)
    priced = [
        compose_epsilon(gaussian_event(noise), delta, accountant="pld", pld_interval=interval)
        for delta in deltas
    ]

    def worst(epsilon: float) -> list[float]:
        return [
            compose_epsilon(
                [(approximate_event(epsilon, 0.0), n)],
                delta,
                accountant="pld",
                pld_interval=interval,
            )
            for delta in deltas
        ]

    assert all(w <= p + interval * n for w, p in zip(worst(epsilon), priced, strict=True))
    assert any(
        w > p + interval * n for w, p in zip(worst(3 * epsilon), priced, strict=True)
    )  # the check can fail


def plan_of(accountant: str = "rdp", **saliency) -> PrivacyPlan:
    return make_plan(
        RunConfig(
            privacy=PrivacyConfig(epsilon=2.0, accountant=accountant),
            saliency=SaliencyConfig(**saliency),
            finetune=FinetuneConfig(steps=2, batch_size=1000),
        ),
        1000,
    )


PTR = (
    {"mechanism": "propose_test_release", "noise_multiplier": 4.0},
    "propose-test-release, ε = 0.25, δ = 1.448e-05",
)


@pytest.mark.parametrize(
    "accountant,saliency,words",
    [
        ("rdp", {"mechanism": "exponential", "noise_multiplier": 8.0}, "exponential mechanism"),
        ("pld", *PTR),
        ("rdp", *PTR),
        ("rdp", {"score": "force", "noise_multiplier": 20.0, "rounds": 3}, "Gaussian, noise 20"),
    ],
)
def test_plan_ledger_and_replay_of_every_kind_of_selection(saliency, words, accountant, tmp_path):
    plan = plan_of(accountant, **saliency)
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    (event,) = [event for name, event, _ in plan_events(plan) if name == "selection"]
    assert describe_event(event).startswith(words)
    assert 0 < plan.selection.share < 1 and plan.selection.count == saliency.get("rounds", 1)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    for i in range(plan.selection.count):
        ledger.record(f"selection/{i}", event, "s", "selection")
        ledger.record(f"selection/{i}", event, "s", "selection")  # a replay, free
    for i in range(plan.steps):
        ledger.record(f"finetune/step/{i}", plan.finetune.event(), "s", "finetune")
    again = Ledger.open(tmp_path / "ledger.jsonl")
    assert (
        again.epsilon_spent() == pytest.approx(plan.composed_epsilon, rel=1e-9)
        and plan.composed_epsilon <= 2.0
    )
    assert plan.composed_epsilon > 1.9
    free = make_plan(
        RunConfig(
            privacy=PrivacyConfig(epsilon=2.0, accountant=accountant),
            saliency=SaliencyConfig(ratio=1.0),
            finetune=FinetuneConfig(steps=2, batch_size=1000),
        ),
        1000,
    )
    assert (
        plan.finetune.noise_multiplier > free.finetune.noise_multiplier
    )  # the selection was paid for


def test_force_pays_for_every_round_and_the_exponential_as_much_as_the_gaussian():
    one, five = (plan_of(score=score, noise_multiplier=10.0) for score in ("snip", "force"))
    assert one.selection.count == 1 and five.selection.count == 5
    assert five.finetune.noise_multiplier > one.finetune.noise_multiplier
    assert (
        plan_of(score="snip", mechanism="exponential", noise_multiplier=10.0).finetune
        == one.finetune
    )
    assert plan_of(score="synflow").selection is None


def test_selections_that_do_not_fit_are_one_line():
    with pytest.raises(
        ConfigError,
        match=r"selection alone spends epsilon = 3\.\d+ of the planned 2; from .* at most half",
    ):
        plan_of(mechanism="propose_test_release", noise_multiplier=0.3)
    for saliency, words in [
        (
            {"score": "noisy_mean_gradient"},
            r"saliency\.score = 'noisy_mean_gradient': must be per_sample_norm or snip",
        ),
        ({"score": "force"}, r"saliency\.score = 'force'"),
        ({"score": "synflow"}, r"saliency\.score = 'synflow'"),
        ({"granularity": "layer"}, r"saliency\.granularity = 'layer': must be matrix"),
        ({"sample_rate": 0.5}, r"saliency\.sample_rate = 0\.5: must be 1"),
    ]:
        with pytest.raises(ConfigError, match=words):
            from_dict({"saliency": {"mechanism": "exponential", **saliency}})
    with pytest.raises(ConfigError, match=r"finetune\.randomize = 'qkv': must be none"):
        from_dict({"saliency": {"ratio": 1.0}, "finetune": {"adapter": "full", "randomize": "qkv"}})
