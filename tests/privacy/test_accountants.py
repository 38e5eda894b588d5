from __future__ import annotations

import json
import logging
import math

import pytest
from dp_accounting import dp_event
from dp_accounting.privacy_accountant import UnsupportedEventError
from hypothesis import given, settings
from hypothesis import strategies as st

from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountants import (
    compose_epsilon,
    epsilon_text,
    make_accountant,
    stage_shares,
    supports,
)
from sapf_ray.privacy.events import (
    approximate_event,
    event_from_json,
    event_to_json,
    exponential_event,
    gaussian_event,
    group_events,
)

DELTA = 1e-6


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact delta of one Gaussian release."""

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cdf(
        -0.5 / sigma - epsilon * sigma
    )


@pytest.mark.parametrize("sigma", [1.0, 5.0, 25.0])
def test_pld_agrees_with_the_closed_form_of_a_gaussian_release(sigma):
    epsilon = compose_epsilon(gaussian_event(sigma), DELTA, accountant="pld")
    assert gaussian_delta(epsilon, sigma) == pytest.approx(DELTA, rel=0.02)


def test_rdp_agrees_with_opacus():
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    orders = [1 + x / 10 for x in range(10, 100)] + list(range(11, 64))
    rate, sigma, steps = 4096 / 45_000, 1.796, 1000
    rdp = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
    theirs, _ = get_privacy_spent(orders=orders, rdp=rdp, delta=DELTA)
    assert compose_epsilon(
        [(gaussian_event(sigma, rate), steps)], DELTA, accountant="rdp"
    ) == pytest.approx(theirs, rel=1e-3)


def test_pld_agrees_with_opacus_prv():
    from opacus.accountants import PRVAccountant

    rate, sigma, steps = 0.2, 4.0, 150
    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    theirs = prv.get_epsilon(DELTA, eps_error=0.01)
    assert compose_epsilon(
        [(gaussian_event(sigma, rate), steps)], DELTA, accountant="pld"
    ) == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@settings(max_examples=4, deadline=None)
@given(sigma=st.floats(2, 20), rate=st.floats(0.01, 1), steps=st.integers(1, 200))
def test_epsilon_falls_with_noise_and_rises_with_rate_and_steps(accountant, sigma, rate, steps):
    def epsilon(sigma: float, rate: float, steps: int) -> float:
        return compose_epsilon([(gaussian_event(sigma, rate), steps)], DELTA, accountant=accountant)

    base, slack = epsilon(sigma, rate, steps), 1 + 1e-6
    assert epsilon(sigma * 1.2, rate, steps) <= base * slack
    assert base <= epsilon(sigma, min(1.0, rate * 1.2), steps) * slack
    assert base <= epsilon(sigma, rate, steps + 10) * slack


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_noise_is_infinite_and_nothing_is_zero(accountant):
    noisy = (gaussian_event(5.0), 1)
    assert (
        compose_epsilon([noisy, (dp_event.NonPrivateDpEvent(), 1)], DELTA, accountant=accountant)
        == math.inf
    )
    assert (
        compose_epsilon([noisy, (gaussian_event(0.0, 0.1), 10)], DELTA, accountant=accountant)
        == math.inf
    )
    assert (
        compose_epsilon([noisy, (dp_event.GaussianDpEvent(0.0), 1)], DELTA, accountant=accountant)
        == math.inf
    )
    assert compose_epsilon([], DELTA, accountant=accountant) == 0


@pytest.mark.parametrize("sigma,rate", [(1.0, 0.2), (0.5, 0.1), (2.0, 0.4), (8.0, 0.5)])
def test_rdp_stays_quiet_where_dp_accounting_warns(sigma, rate, capfd):
    from dp_accounting.rdp import RdpAccountant

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("absl").addHandler(handler)
    try:
        RdpAccountant().compose(gaussian_event(sigma, rate), 10)
        assert messages, "the case shows nothing: dp-accounting does not warn here"
        messages.clear()
        capfd.readouterr()
        make_accountant("rdp").compose(gaussian_event(sigma, rate), 10).get_epsilon(DELTA)
        assert not messages
        assert capfd.readouterr() == ("", "")
    finally:
        logging.getLogger("absl").removeHandler(handler)


def test_equal_events_are_grouped_through_compositions():
    a, b = gaussian_event(1.0), gaussian_event(2.0, 0.1)
    nested = dp_event.ComposedDpEvent(
        [a, dp_event.SelfComposedDpEvent(dp_event.ComposedDpEvent([b, a]), 3), b]
    )
    assert group_events(nested) == {a: 4, b: 4}
    assert group_events([(a, 2), (a, 1), (b, 0)]) == {a: 3}


def test_shares_sum_to_one_and_follow_the_order_of_least_epsilon():
    step = gaussian_event(1.796, 4096 / 45_000)
    shares = stage_shares(
        {"selection": [(gaussian_event(5.0), 1)], "finetune": [(step, 1000)]}, DELTA
    )
    assert sum(shares.values()) == pytest.approx(1)
    accountant = make_accountant("rdp").compose(gaussian_event(5.0)).compose(step, 1000)
    _, order = accountant.get_epsilon_and_optimal_order(DELTA)
    total = float(accountant.rdp[list(accountant.orders).index(order)])
    assert shares["selection"] == pytest.approx(order / (2 * 25) / total)


def test_shares_reproduce_the_paper_when_selection_is_a_subsample():
    # paper, table 10, CelebA, epsilon 10: 0.17 %; design section 4: only with about 50,000 sampled
    # images
    n = 162_770
    stages = {
        "selection": [(gaussian_event(5.0, 50_000 / n), 1)],
        "finetune": [(gaussian_event(0.8, 4096 / n), 1000)],
    }
    assert stage_shares(stages, 1 / (n * math.log(n)))["selection"] == pytest.approx(
        0.0017, rel=0.25
    )


def test_shares_have_no_meaning_without_noise():
    assert stage_shares({"finetune": [(gaussian_event(0.0), 3)]}, DELTA) is None
    assert stage_shares({}, DELTA) is None


@pytest.mark.parametrize(
    "event",
    [
        gaussian_event(1.5),
        gaussian_event(1.5, 0.25),
        gaussian_event(0.0),
        dp_event.SelfComposedDpEvent(gaussian_event(2.0, 0.1), 7),
        dp_event.ComposedDpEvent((gaussian_event(2.0), dp_event.NonPrivateDpEvent())),
        exponential_event(5.0),
        approximate_event(0.2, 1e-7),
    ],
)
def test_events_survive_json(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"type": "os"},
        {"type": "Gaussian"},
        {"type": "Gaussian", "noise_multiplier": -1.0},
        {"type": "Gaussian", "noise_multiplier": "1"},
        {"type": "Gaussian", "noise_multiplier": math.inf},
        {"type": "Gaussian", "noise_multiplier": 1.0, "more": 1},
        {"type": "PoissonSampled", "sampling_probability": 1.5, "event": {"type": "NonPrivate"}},
        {"type": "ApproximateDp", "epsilon": 1.0, "delta": 2.0},
        {"type": "SelfComposed", "count": 1.5, "event": {"type": "NonPrivate"}},
    ],
)
def test_json_that_is_no_event_is_refused(data):
    with pytest.raises(ValueError):
        event_from_json(data)


def test_exponential_top_k_is_priced_as_its_gaussian():
    for accountant in ("pld", "rdp"):
        ours, gaussian = (
            compose_epsilon([(e, 2)], DELTA, accountant=accountant)
            for e in (exponential_event(3.0), gaussian_event(3.0))
        )
        assert ours == gaussian
        assert compose_epsilon(exponential_event(0.0), DELTA, accountant=accountant) == math.inf


def test_approximate_dp_alone_costs_its_own_numbers():
    event = approximate_event(0.7, DELTA / 2)
    assert compose_epsilon(event, DELTA / 2, accountant="pld") == pytest.approx(0.7, abs=2e-4)
    assert (
        compose_epsilon(event, DELTA / 4, accountant="pld")
        == math.inf
        == compose_epsilon(event, DELTA / 4, accountant="rdp")
    )
    assert compose_epsilon(approximate_event(math.inf, 0.0), DELTA, accountant="pld") == math.inf
    # k-fold composition of randomised response by hand: 1 - delta' is what stays hidden
    epsilon, k, target = 0.3, 5, 0.02
    p = 1 / (1 + math.exp(-epsilon))
    loss = [
        (math.comb(k, i) * p**i * (1 - p) ** (k - i), epsilon * (2 * i - k)) for i in range(k + 1)
    ]

    def hockey_stick(e: float) -> float:
        return sum(w * max(0.0, 1 - math.exp(e - x)) for w, x in loss)

    found = compose_epsilon(
        [(approximate_event(epsilon, 0.0), k)], target, accountant="pld", pld_interval=1e-5
    )
    assert hockey_stick(found) == pytest.approx(target, rel=1e-3)
    with_delta = compose_epsilon(
        [(approximate_event(epsilon, 1e-3), k)], target, accountant="pld", pld_interval=1e-5
    )
    hidden = (1 - 1e-3) ** k
    assert 1 - hidden + hidden * hockey_stick(with_delta) == pytest.approx(target, rel=1e-3)


@pytest.mark.parametrize("epsilon,delta", [(0.1, 0.0), (1.0, DELTA / 10), (4.0, DELTA / 100)])
def test_rdp_of_approximate_dp_is_an_upper_bound_that_falls_with_its_numbers(epsilon, delta):
    rest = (gaussian_event(2.0, 0.1), 100)
    both = [(approximate_event(epsilon, delta), 1), rest]
    alone = compose_epsilon([rest], DELTA, accountant="rdp")
    pld, rdp = (
        compose_epsilon(both, DELTA, accountant=accountant) for accountant in ("pld", "rdp")
    )
    assert pld <= rdp * (1 + 1e-6) and alone < rdp <= 1.05 * (alone + epsilon)
    more = [(approximate_event(epsilon, delta), 2), rest]
    assert rdp < compose_epsilon(more, DELTA, accountant="rdp") and pld < compose_epsilon(
        more, DELTA, accountant="pld"
    )
    shares = stage_shares(
        {"selection": [(approximate_event(epsilon, delta), 1)], "finetune": [rest]}, DELTA
    )
    assert sum(shares.values()) == pytest.approx(1) and shares["selection"] > 0


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="pld, rdp"):
        make_accountant("gdp")
    with pytest.raises(ValueError):
        event_to_json(dp_event.LaplaceDpEvent(1.0))


LAPLACE = dp_event.PoissonSampledDpEvent(0.1, dp_event.LaplaceDpEvent(3.0))  # not in our RDP


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_our_events_go_through_the_librarys_composition(accountant):
    """``supports`` and ``ledger`` know them, also inside compositions."""
    ours = [exponential_event(3.0), approximate_event(0.2, 1e-8), gaussian_event(2.0, 0.1)]
    nested = dp_event.SelfComposedDpEvent(dp_event.ComposedDpEvent(ours), 2)
    made = make_accountant(accountant)
    assert made.supports(nested)
    assert made.get_epsilon(DELTA) == 0, "asking composes nothing"
    assert made.compose(nested).ledger == nested
    one_by_one = compose_epsilon([(event, 2) for event in ours], DELTA, accountant=accountant)
    assert made.get_epsilon(DELTA) == pytest.approx(one_by_one, rel=1e-9)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_delta_of_epsilon_is_the_inverse(accountant):
    made = make_accountant(accountant)
    made.compose(gaussian_event(4.0)).compose(approximate_event(0.1, DELTA / 10))
    assert made.get_delta(made.get_epsilon(DELTA)) == pytest.approx(DELTA, rel=1e-3)


def test_an_event_that_an_accountant_does_not_know_is_not_available():
    events = [(gaussian_event(4.0), 1), (LAPLACE, 2)]
    assert supports("pld", events) and not supports("rdp", events)
    assert epsilon_text(events, DELTA, accountant="rdp") == "n/a"
    assert float(epsilon_text(events, DELTA, accountant="pld")) > 0
    assert stage_shares({"selection": events}, DELTA) is None
    with pytest.raises(UnsupportedEventError):
        compose_epsilon(events, DELTA, accountant="rdp")
    # nothing is left of the convergence filter, also after an error
    assert not logging.getLogger("absl").filters


def test_no_noise_is_infinite_for_every_accountant():
    assert supports("rdp", gaussian_event(0.0))
    assert epsilon_text(gaussian_event(0.0), DELTA, accountant="rdp") == "inf"
