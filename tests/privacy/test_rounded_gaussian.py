"""The sampler's law, by enumeration against 60 digits, and by statistics where cells are many."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chisquare, kstest, norm

from sapf_ray.privacy import rounded_gaussian as module
from sapf_ray.privacy.keyed_rng import NoiseKey, NoiseStream
from sapf_ray.privacy.rounded_gaussian import (
    TAIL,
    exact_mass,
    rounded_gaussian,
    sampler_delta,
    strips_for,
)

KEY = NoiseKey(bytes(range(32)))
STDS = [512.0, 777.3, 1.7 * 2**20, 25.0 * 2**21 + 0.1]


def cells(strips) -> tuple[np.ndarray, np.ndarray]:
    """(strip, magnitude) of every cell; of a fine grid a random part of each strip."""
    used = np.flatnonzero(strips.reject)
    strip, magnitude = [], []
    for i in used:
        length = int(strips.mask[i]) + 1
        inside = np.arange(length)
        if length > 512:
            inside = np.unique(np.random.default_rng(i).integers(length, size=64))
            inside = np.concatenate([[0], inside, [length - 1]])
        strip.append(np.full(len(inside), i))
        magnitude.append(strips.start[i] + inside)
    return np.concatenate(strip), np.concatenate(magnitude)


def check_cover(strips) -> None:
    """Strips follow one another without gap or overlap, out to 12 sigma."""
    used = np.flatnonzero(strips.reject)
    ends = strips.start[used] + strips.mask[used] + 1
    assert strips.start[0] == 0 and (strips.start[used][1:] == ends[:-1]).all()
    assert ends[-1] >= 12 * strips.std
    assert (((strips.mask + 1) & strips.mask) == 0).all()
    assert 1 + 10 + strips.cell_bits + strips.acceptance_bits <= 64


@pytest.mark.parametrize("std", STDS)
def test_every_outcome_has_its_probability(std):
    """P(cell) is proportional to the exact acceptance over the strip's length, for every cell."""
    strips = strips_for(std)
    check_cover(strips)
    strip, magnitude = cells(strips)
    chosen = np.linspace(0, len(strip) - 1, 400).astype(int)
    for i in [0, 1, *chosen]:
        s, m = int(strip[i]), int(magnitude[i])
        exact = strips.exact_acceptance(s, m, bits=180) / 2**180
        length = int(strips.mask[s]) + 1
        per_cell = exact / length * strips.bound * (1 if m else 2)
        assert per_cell == pytest.approx(float(exact_mass(m, std)), rel=1e-14)
        assert exact <= 1


@pytest.mark.parametrize("std", STDS)
def test_fast_decisions_are_certain(std):
    """The float64 acceptance is within the guard of the exact one, the tables within both."""
    strips = strips_for(std)
    strip, magnitude = cells(strips)
    fast = strips.acceptance(strip, magnitude)
    bits = strips.acceptance_bits
    assert (strips.accept[strip] <= np.floor(fast * 2.0**bits * (1 - 2.0**-44))).all()
    assert (strips.reject[strip] > fast * 2.0**bits * (1 + 2.0**-44)).all()
    chosen = np.linspace(0, len(strip) - 1, 300).astype(int)
    for i in chosen:
        exact = strips.exact_acceptance(int(strip[i]), int(magnitude[i]), bits=190)
        assert abs(Fraction(float(fast[i])) * 2**190 / exact - 1) < 2.0**-44


def test_mass_is_that_of_the_rounded_gaussian():
    """Against differences of the distribution function, on a grid coarse enough for them."""
    for std in (2.0, 7.5):
        for m in range(int(6 * std)):
            expected = norm.sf((m - 0.5) / std) - norm.sf((m + 0.5) / std)
            mass = float(exact_mass(m, std)) * norm.pdf(0) / std
            assert mass == pytest.approx(expected, rel=1e-9)
    total = sum(float(exact_mass(m, 512.0)) * (2 if m else 1) for m in range(12 * 512))
    assert total * norm.pdf(0) / 512 == pytest.approx(1.0, rel=1e-13)


def frequencies_fit(draw, std: float) -> bool:
    """Chi-square over bins of equal probability, and over single cells about the centre."""
    drawn = draw(400_000, std, KEY.stream("law"))
    edges = np.round(norm.ppf(np.linspace(0, 1, 101)[1:-1]) * std)
    counts = np.bincount(np.searchsorted(edges, drawn, side="left"), minlength=100)
    cdf = norm.cdf((np.concatenate([[-np.inf], edges, [np.inf]]) + 0.5) / std)
    good = chisquare(counts, np.diff(cdf) * len(drawn)).pvalue > 1e-6
    near = drawn[np.abs(drawn) <= 3] + 3
    expected = np.array([float(exact_mass(abs(k), std)) for k in range(-3, 4)])
    expected *= norm.pdf(0) / std * len(drawn)
    seen = np.bincount(near, minlength=7)
    middle = ((seen - expected) ** 2 / expected).sum()
    return bool(good and middle < 60 and abs(drawn.mean()) < 6 * std / math.sqrt(len(drawn)))


def twin(**changes):
    """The sampler with other tables: strips of wrong weight."""

    def draw(n: int, std: float, stream: NoiseStream) -> np.ndarray:
        strips = strips_for(std)
        broken = type(strips)(**{**vars(strips), **{k: f(strips) for k, f in changes.items()}})
        drawn = [broken.draw(stream) for _ in range(-(-n // 10_000))]
        return np.concatenate(drawn)[:n]

    return draw


@pytest.mark.parametrize("std", [512.0, 1000.0])
def test_coarse_grids_by_frequencies(std):
    assert frequencies_fit(rounded_gaussian, std)


@pytest.mark.parametrize(
    "broken",
    [
        lambda n, std, stream: np.zeros(n, np.int64),
        lambda n, std, stream: rounded_gaussian(n, std / 2 + 512, stream),
        lambda n, std, stream: np.abs(rounded_gaussian(n, std, stream)),
        lambda n, std, stream: rounded_gaussian(n, std, stream) * 2 // 2 * 2,
        twin(accept=lambda s: np.where(s.accept > 0, 2**36, 0)),  # every cell accepted
        twin(accept=lambda s: s.accept >> (s.start > 1500), reject=lambda s: s.accept * 0),
        twin(start=lambda s: s.start + 30 * (s.start > 300)),  # a gap
    ],
)
def test_broken_twins_are_rejected(broken):
    assert not frequencies_fit(broken, 1000.0)


@pytest.mark.parametrize("std", [1.7 * 2**20, 2.0**40])
def test_fine_grids_are_gaussian(std):
    drawn = rounded_gaussian(300_000, std, KEY.stream("fine")) / std
    assert kstest(drawn, "norm").pvalue > 1e-6
    assert abs((drawn**2).mean() - 1) < 6 * math.sqrt(2 / len(drawn))
    assert abs((drawn**4).mean() - 3) < 6 * math.sqrt(96 / len(drawn))
    assert not kstest(drawn / 2, "norm").pvalue > 1e-6


def test_exact_decisions_happen_and_agree(monkeypatch):
    """At 2**40 steps few first bits are left, so the slow way is taken; a wider guard takes it
    more often and must decide the same where no further bits are needed."""
    calls = []
    slow = module.Strips.exact_acceptance
    monkeypatch.setattr(
        module.Strips,
        "exact_acceptance",
        lambda self, *a, **k: calls.append(a) or slow(self, *a, **k),
    )
    stream = KEY.stream("exact")
    assert len(strips_for(2.0**40).draw(stream)) > 15_000
    assert calls


def test_equal_streams_give_equal_draws_and_longer_draws_begin_alike():
    short, long = (rounded_gaussian(n, 5000.0, KEY.stream("a", 1)) for n in (10, 50_000))
    assert (short == long[:10]).all() and short.dtype == np.int64
    assert not (long[:10_000] == rounded_gaussian(10_000, 5000.0, KEY.stream("a", 2))).all()
    assert len(rounded_gaussian(0, 5000.0, KEY.stream("a"))) == 0


def test_the_same_numbers_on_every_machine():
    """Regression: a seed's meaning; a change of these numbers is a change of every run's noise."""
    assert rounded_gaussian(4, 1e6, NoiseKey(bytes(32)).stream("noise")).tolist() == KNOWN


KNOWN = [-776241, 1119803, -1086386, 1665163]


@pytest.mark.parametrize("std", [511.9, 2.0**41, math.nan, 0.0])
def test_noise_that_the_grid_cannot_carry_is_refused(std):
    with pytest.raises(ValueError, match="grid steps"):
        rounded_gaussian(1, std, KEY.stream("a"))


def test_what_is_cut_off_is_what_delta_grows_by():
    assert 2 * norm.sf(12) < TAIL
    assert sampler_delta(10, 2, epsilon=0.0) == 40 * TAIL
    assert sampler_delta(250_000, 1000, epsilon=10.0) < 1e-19
