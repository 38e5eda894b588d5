"""Every record's clipped integers have norm at most C; norms never err downwards."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapf_ray.privacy.clipping import clip_factors, clipped_units, norms_upward
from sapf_ray.privacy.fixed_point import grid_step


def exact_squared_norm(values: list[float] | list[int]) -> Fraction:
    return sum((Fraction(value) ** 2 for value in values), Fraction(0))


finite = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(row=st.lists(finite, min_size=1, max_size=30))
def test_norms_never_err_downwards(row):
    tensor = torch.tensor([row], dtype=torch.float32)
    true = exact_squared_norm(tensor[0].tolist())
    upper = Fraction(float(norms_upward(tensor)[0])) ** 2
    assert true <= upper <= true * Fraction(1000002, 1000000)
    assert norms_upward(tensor, math.inf)[0] == tensor.abs().max()


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(finite, min_size=1, max_size=30),
    bound=st.floats(1e-3, 1e3),
    mode=st.sampled_from(["automatic", "flat"]),
    gamma=st.floats(1e-6, 1.0),
    order=st.sampled_from([2.0, math.inf]),
    wide=st.booleans(),
)
def test_no_record_contributes_more_than_the_bound(row, bound, mode, gamma, order, wide):
    dtype = torch.float64 if wide else torch.float32
    rows = torch.tensor([row], dtype=dtype)
    factors = clip_factors(norms_upward(rows, order), bound, mode=mode, gamma=gamma)
    step = grid_step(bound)
    units = clipped_units(rows, factors, step).tolist()
    if order == 2.0:
        assert exact_squared_norm(units) * Fraction(step) ** 2 <= Fraction(bound) ** 2
    else:
        assert max(abs(u) for u in units) * Fraction(step) <= Fraction(bound)
    # and not much less than it should be
    product = rows[0].double() * float(factors)
    kept = torch.tensor(units, dtype=torch.float64) * step
    assert float((product - kept).abs().max()) <= step * 1.5


@pytest.mark.parametrize("mode", ["automatic", "flat"])
@pytest.mark.parametrize("n,shape", [(1, (3,)), (1500, (7,)), (40, (300, 301))])
def test_units_are_the_sum_of_the_records(mode, n, shape):
    """Also where rows and columns are worked on in pieces."""
    rows = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
    factors = clip_factors(norms_upward(rows), 0.7, mode=mode, gamma=0.1)
    step = grid_step(0.7)
    expected = sum(
        (row * (factor / step)).to(torch.int64) for row, factor in zip(rows, factors, strict=True)
    )
    assert torch.equal(clipped_units(rows, factors, step), expected)
    assert torch.equal(
        clipped_units(rows.flip(0), factors.flip(0), step), clipped_units(rows, factors, step)
    )


def test_entries_at_the_bound_do_not_overflow_the_piecewise_sum():
    rows = torch.full((1023, 2), 1.0)
    rows[:, 1] = -1.0
    bound = math.nextafter(2.0, 0.0)  # entries of just under 2**21 steps
    factors = torch.full((1023,), bound)
    units = clipped_units(rows, factors, grid_step(bound))
    assert units.tolist() == [1023 * (2**21 - 1), -1023 * (2**21 - 1)] or units[0] > 2**30


@pytest.mark.parametrize("mode", ["automatic", "flat"])
def test_records_that_are_not_finite_contribute_nothing(mode):
    rows = torch.randn(5, 3, 2)
    rows[1, 0, 0], rows[3, 1, 1] = math.inf, math.nan
    factors = clip_factors(norms_upward(rows), 1.0, mode=mode, gamma=0.01)
    assert factors[1] == factors[3] == 0
    kept = [0, 2, 4]
    step = grid_step(1.0)
    assert torch.equal(
        clipped_units(rows, factors, step), clipped_units(rows[kept], factors[kept], step)
    )
    assert factors.dtype == torch.float32 and torch.isfinite(factors).all()


def test_no_record_is_zero_and_nothing_is_divided_by_the_batch():
    assert torch.equal(
        clipped_units(torch.zeros(0, 2, 3), torch.zeros(0), 0.5),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    rows = torch.ones(4, 1)
    assert clipped_units(rows, torch.ones(4), 0.5).tolist() == [8]


def test_clipping_formulas():
    norms = torch.tensor([0.0, 0.5, 2.0])
    flat = clip_factors(norms, 1.0, mode="flat")
    assert flat[:2].tolist() == [1.0, 1.0] and float(flat[2]) == pytest.approx(0.5, rel=2e-6)
    automatic = clip_factors(norms, 1.0, mode="automatic", gamma=0.5)
    assert automatic.tolist() == pytest.approx([2.0, 1.0, 0.4], rel=2e-6)
    assert (automatic.double() * norms < 1.0).all()


@pytest.mark.parametrize("kwargs", [{"clipping_norm": 0.0}, {"mode": "soft"}, {"gamma": 0.0}])
def test_clipping_without_a_bound_is_refused(kwargs):
    good = {"clipping_norm": 1.0, "mode": "automatic", "gamma": 0.1}
    with pytest.raises(ValueError):
        clip_factors(torch.ones(2), **{**good, **kwargs})


def test_other_orders_are_refused():
    with pytest.raises(ValueError, match="order"):
        norms_upward(torch.ones(1, 2), 1.0)
