"""Exact sums: associative, on one grid, bound to their sensitivity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapf_ray.privacy.fixed_point import MAX_UNITS, ExactSum, grid_step


@settings(max_examples=200, deadline=None)
@given(bound=st.floats(1e-12, 1e12))
def test_step_is_the_power_of_two_below_the_bound_over_a_million(bound):
    step = grid_step(bound)
    assert math.frexp(step)[0] == 0.5
    assert bound * 2.0**-21 < step <= bound * 2.0**-20


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_step_of_no_bound_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        grid_step(bound)


def parts(n: int) -> list[ExactSum]:
    generator = torch.Generator().manual_seed(3)
    units = [torch.randint(-(2**21), 2**21, (n, *shape), generator=generator) for shape in SHAPES]
    return [ExactSum.of([u[i] for u in units], 0.7) for i in range(n)]


SHAPES = [(5,), (2, 3)]


def test_sums_do_not_depend_on_order_or_grouping():
    records = parts(200)
    one = two = ExactSum.zeros(SHAPES, 0.7)
    for record in records:
        one = one + record
    for start in reversed(range(0, 200, 30)):
        group = ExactSum.zeros(SHAPES, 0.7)
        for record in reversed(records[start : start + 30]):
            group = group + record
        two = group + two
    assert one.digest() == two.digest()
    assert all(torch.equal(a, b) for a, b in zip(one.units, two.units, strict=True))


def test_digest_knows_grid_sensitivity_shape_and_every_unit():
    units = [torch.arange(6)]
    sums = [
        ExactSum.of(units, 1.0),
        ExactSum.of(units, 1.5),
        ExactSum.of(units, 2.0),
        ExactSum.of([units[0].view(2, 3)], 1.0),
        ExactSum.of([units[0][:3], units[0][3:]], 1.0),
        ExactSum.of([units[0] + (torch.arange(6) == 5)], 1.0),
    ]
    assert len({total.digest() for total in sums}) == len(sums)
    assert ExactSum.of([units[0].clone()], 1.0).digest() == sums[0].digest()


def test_values_are_exact_and_a_sum_out_of_range_is_refused():
    total = ExactSum.of([torch.tensor([3, -(2**50)])], 1.0)
    assert total.values()[0].tolist() == [3 * 2.0**-20, -(2.0**30)]
    with pytest.raises(OverflowError):
        ExactSum.of([torch.tensor([MAX_UNITS + 1])], 1.0).values()


def test_rounding_goes_towards_zero_and_refuses_what_is_not_finite():
    step = grid_step(1.0)
    values = torch.tensor([1.5, -1.5, 0.99, -0.99]) * step
    assert ExactSum.rounded([values], 1.0).units[0].tolist() == [1, -1, 0, 0]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            ExactSum.rounded([torch.tensor([value])], 1.0)


def test_unequal_sums_cannot_be_added_and_fields_are_checked():
    total = ExactSum.zeros([(2,)], 1.0)
    for other in (ExactSum.zeros([(2,)], 1.5), ExactSum.zeros([(3,)], 1.0)):
        with pytest.raises(ValueError, match="cannot be added"):
            total + other
    for wrong in (
        {"units": [torch.zeros(2)]},
        {"step": 0.3},
        {"sensitivity": 0.0},
    ):
        fields = {"units": [torch.zeros(2, dtype=torch.int64)], "step": 0.5, "sensitivity": 1.0}
        with pytest.raises(ValueError):
            ExactSum(**{**fields, **wrong})
