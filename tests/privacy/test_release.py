"""The one door: it pays first, draws once, and binds the noise to run, release and sum."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2

from sapf_ray.errors import BudgetError
from sapf_ray.privacy import release as release_module
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs import runlog

BOUND, SIGMA, N = 0.6, 1.7, 20_000
KEY = NoiseKey(bytes(range(32)))


def plan(mechanism: str = "gaussian", epsilon: float = 1e6, **stage) -> PrivacyPlan:
    fields = {
        "noise_multiplier": SIGMA,
        "sample_rate": 1.0,
        "count": 10**6,
        "share": None,
        "mechanism": mechanism,
    }
    return PrivacyPlan(
        epsilon=epsilon,
        delta=1e-6,
        accountant="rdp",
        n_records=1000,
        batch_size=100,
        sample_rate=0.1,
        steps=1,
        selection=StagePlan(**{**fields, **stage}),
        finetune=None,
        composed_epsilon=epsilon,
    )


@pytest.fixture
def opened(tmp_path):
    def open_releaser(planned: PrivacyPlan | None = None, key: NoiseKey = KEY) -> Releaser:
        planned = planned or plan()
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        return Releaser(
            key=key,
            ledger=Ledger.create(path, planned),
            plan=planned,
            on_change=runlog.release_changed,
        )

    return open_releaser


def total_of(seed: int = 0, n: int = N) -> ExactSum:
    generator = torch.Generator().manual_seed(seed)
    return ExactSum.of([torch.randint(-(2**30), 2**30, (n,), generator=generator)], BOUND)


def check_noise(noisy: torch.Tensor, total: ExactSum, std: float) -> None:
    noise = (noisy - total.values()[0]) / std
    statistic = float((noise**2).sum())
    assert chi2.ppf(1e-6, N) < statistic < chi2.ppf(1 - 1e-6, N), "variance is not (sigma C)^2"
    assert abs(float(noise.mean())) < 6 / math.sqrt(N)


@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_noise_has_the_planned_scale_times_the_sums_own_sensitivity(opened, slack):
    releaser = opened(plan(slack=slack))
    total = total_of()
    (noisy,) = releaser.gaussian("selection", total, stage="selection")
    check_noise(noisy, total, SIGMA * BOUND * (1 + slack))
    for wrong in (0.5, 2.0, 1 / BOUND):
        with pytest.raises(AssertionError):
            check_noise(noisy, total, SIGMA * BOUND * (1 + slack) * wrong)
    assert noisy.dtype == torch.float64
    units = noisy / grid_step(BOUND)
    assert torch.equal(units, units.round()), "outputs lie on the sum's grid"


@pytest.mark.parametrize(
    "twin",
    [
        lambda total, m, stream: total.values(),
        lambda total, m, stream: ORIGINAL(total, m / 2, stream),
        lambda total, m, stream: ORIGINAL(total, m / total.sensitivity, stream),
        lambda total, m, stream: [sum(ORIGINAL(total, m, stream)[0] for _ in range(3)) / 3],
    ],
)
def test_broken_twins_are_rejected(opened, monkeypatch, twin):
    monkeypatch.setattr(release_module.noise, "noisy_sum", twin)
    total = total_of()
    (noisy,) = opened().gaussian("selection", total, stage="selection")
    with pytest.raises(AssertionError):
        check_noise(noisy, total, SIGMA * BOUND)


ORIGINAL = release_module.noise.noisy_sum


@pytest.mark.parametrize("method", ["gaussian", "exponential", "propose_test"])
def test_it_pays_before_it_draws(opened, monkeypatch, method):
    mechanism = "propose_test_release" if method == "propose_test" else method
    releaser = opened(plan(mechanism, delta=1e-7))
    drawn = []

    def draw(*arguments):
        drawn.append(len(Ledger.open(releaser.ledger.path).events()))
        raise KeyboardInterrupt

    for name in ("noisy_sum", "add_gumbel", "add_laplace"):
        monkeypatch.setattr(release_module.noise, name, draw)
    options = {} if method == "gaussian" else {"n": 2}
    with pytest.raises(KeyboardInterrupt):
        getattr(releaser, method)("selection", total_of(n=5), stage="selection", **options)
    assert drawn == [1]


def test_nothing_is_drawn_when_the_budget_refuses(opened, monkeypatch):
    releaser = opened(plan(epsilon=0.1, count=0))
    monkeypatch.setattr(release_module.noise, "noisy_sum", lambda *a: pytest.fail("drew"))
    with pytest.raises(BudgetError, match="stopped before the release"):
        releaser.gaussian("selection", total_of(n=3), stage="selection")
    assert releaser.ledger.events() == []


def test_the_same_sum_is_a_free_replay_and_another_is_charged_with_other_noise(opened):
    releaser, total = opened(), total_of()
    first = releaser.gaussian("a", total, stage="selection")[0]
    assert torch.equal(releaser.gaussian("a", total, stage="selection")[0], first)
    other = ExactSum.of([total.units[0] + (torch.arange(N) == 0)], BOUND)
    noise = releaser.gaussian("a", other, stage="selection")[0] - other.values()[0]
    elsewhere = releaser.gaussian("b", total, stage="selection")[0] - total.values()[0]
    before = first - total.values()[0]
    for drawn in (noise, elsewhere):
        assert abs(float(torch.corrcoef(torch.stack([drawn, before]))[0, 1])) < 0.05
        check_noise(drawn + total.values()[0], total, SIGMA * BOUND)
    events = releaser.ledger.events()
    assert [event.replay for event in events] == [False, True, False, False]
    assert len({event.noise_id for event in events}) == 3
    assert all(event.noise_id.startswith(f"{releaser.run_id}-") for event in events)


def test_another_sum_under_a_paid_name_is_refused_in_one_line(opened):
    exact = plan(count=1, epsilon=0.0)
    spent = compose_epsilon([(exact.selection.event(), 1)], 1e-6, accountant="rdp")
    releaser = opened(plan(count=1, epsilon=spent * 1.01))
    releaser.gaussian("finetune/step/17", total_of(1, 10), stage="selection")
    with pytest.raises(BudgetError, match="finetune/step/17 was paid with another sum") as error:
        releaser.gaussian("finetune/step/17", total_of(2, 10), stage="selection")
    assert "\n" not in str(error.value) and "micro-batch" in str(error.value)
    assert len(releaser.ledger.events()) == 1


def test_another_sum_is_logged_once(opened, tmp_path):
    releaser = opened()
    log = tmp_path / "log"
    with runlog.recording(runlog.Place(path=str(log), run="r")):
        releaser.gaussian("a", total_of(1, 10), stage="selection")
        releaser.gaussian("a", total_of(1, 10), stage="selection")
        assert not log.exists()
        releaser.gaussian("a", total_of(2, 10), stage="selection")
    assert log.read_text().count('"release_changed"') == 1


def test_exponential_frequencies(opened):
    """n = 1 of three utilities: probabilities proportional to exp(e u / C)."""
    releaser = opened(plan("exponential"))
    step, epsilon = grid_step(BOUND), release_module.draw_epsilon(SIGMA, 1)
    utility = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    total = ExactSum.of([(utility / step).to(torch.int64)], BOUND)
    weights = np.exp(epsilon * utility.numpy() / BOUND)
    draws = 800
    counts = np.zeros(3, int)
    for i in range(draws):
        counts[releaser.exponential(f"x{i}", total, stage="selection", n=1)[0]] += 1
    for count, p in zip(counts, weights / weights.sum(), strict=True):
        assert binomtest(int(count), draws, p).pvalue > 1e-6
    assert binomtest(int(counts[2]), draws, 1.0 - 1e-9).pvalue < 1e-6  # not the exact maximum


def test_propose_test_passes_wide_gaps_and_never_small_ones(opened):
    releaser = opened(plan("propose_test_release", delta=1e-7))
    step = grid_step(BOUND)
    for gap, expected in ((1000.0, ([1, 0], True)), (0.5, (None, False))):
        utility = torch.tensor([gap, 2 * gap, 0.0], dtype=torch.float64)
        total = ExactSum.of([(utility / step).to(torch.int64)], BOUND)
        assert releaser.propose_test(f"{gap}", total, stage="selection", n=2) == expected
    assert releaser.propose_test("all", total, stage="selection", n=3) == ([1, 0, 2], True)


def test_samples_are_poisson_keyed_by_run_and_name(opened):
    releaser = opened(plan(sample_rate=0.1))
    samples = [releaser.sample(f"step/{i}", stage="selection") for i in range(200)]
    counts = np.bincount(np.concatenate(samples), minlength=1000)
    assert (releaser.sample("step/3", stage="selection") == samples[3]).all()
    assert abs(counts.sum() - 20_000) < 6 * math.sqrt(20_000 * 0.9)
    assert np.var([len(s) for s in samples]) == pytest.approx(90, rel=0.6)  # sizes are random
    bound = opened(plan(sample_rate=0.1), KEY.bind("another run"))
    assert len(np.setxor1d(bound.sample("step/3", stage="selection"), samples[3])) > 50


def test_shared_releases_are_paid_once_and_are_not_ones_own(opened):
    mine, other = opened(), opened(key=KEY.bind("shared"))
    other.gaussian("selection", total_of(n=4), stage="selection")
    (paid,) = other.ledger.events()
    for _ in range(2):
        mine.pay_shared("selection", stage="selection", noise_id=paid.noise_id)
    assert [e.noise_id for e in mine.ledger.events()] == [paid.noise_id]
    assert not mine.has_paid("selection") and other.has_paid("selection")


def test_no_noise_only_where_the_plan_is_not_private(opened):
    with pytest.raises(ValueError, match="noise_multiplier"):
        opened(plan(noise_multiplier=0.0)).gaussian("a", total_of(n=3), stage="selection")
    free = dataclasses.replace(plan(noise_multiplier=0.0), non_private=True)
    total = total_of(n=3)
    (values,) = opened(free).gaussian("a", total, stage="selection")
    assert torch.equal(values, total.values()[0])


def test_what_the_plan_does_not_hold_is_refused(opened):
    with pytest.raises(ValueError, match="no releases of stage 'finetune'"):
        opened().gaussian("a", total_of(n=3), stage="finetune")
    with pytest.raises(ValueError, match="exponential in selection, not gaussian"):
        opened(plan("exponential")).gaussian("a", total_of(n=3), stage="selection")
