"""The rounded Gaussian: exactly the law of ``round(N(0, sigma**2) / step)``, drawn in integers.

A floating-point Gaussian has gaps: which float64 values can come out depends on the sum beneath,
and an attacker who knows two candidate sums can tell them apart by values that only one of them can
give [1]. Rounding the noisy value to a coarse grid does not mend the law: a Box-Muller draw from 53
bits differs from the Gaussian by about 2**-24 a value in total variation on a grid of 2**-24 sigma,
which 10**8 values add up to more than 1. So the rounded Gaussian itself is drawn, by rejection:

- Magnitudes 0, 1, ... are covered by 1024 strips whose lengths are powers of two, made so that the
  largest probability in a strip times its length is at most a common bound a. A random word names
  a sign, a strip, a cell in the strip (all exactly uniform) and gives the first bits of a uniform
  number u; the cell is accepted where ``u < r``, r = p(cell) * length / a. So each outcome's
  probability is proportional to p(cell), whatever the strips are. Zero, which has both signs, is
  accepted half as often.
- r is computed in float64 and decides only where it can: where u's first bits fall beside r's, up
  to the error of r, 128 further bits are drawn and r is computed to 60 digits. So no decision
  depends on how a machine rounds an exponential. It costs about 50 ns a value on one core, most of
  it SHAKE-256.

What is left of an error: the tail beyond 12 sigma, of mass 2**-107.8, is cut off, and r is compared
at 128 + 10 bits or more. A value's law is within :data:`TAIL` of the ideal one in total variation.

``round(S + Z) = S + round(Z)`` for a sum S on the grid: the release is the Gaussian mechanism,
rounded, and rounding is post-processing. So the accountant's epsilon holds as it stands, and delta
grows by :func:`sampler_delta`.

References:
    1. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
    2. Karney. Sampling exactly from the normal distribution. ACM TOMS 2016.
    3. Canonne, Kamath, Steinke. The discrete Gaussian for differential privacy. NeurIPS 2020.
       (a different law; the rounded one needs no new accountant)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np

from sapf_ray.privacy.keyed_rng import NoiseStream

MIN_STD = 512.0
"""Smallest standard deviation in grid steps; below it the float64 series is too short."""
MAX_STD = 2.0**40
TAIL = 2.0**-107

_CUT = 12  # standard deviations
_STRIP_BITS = 10
_STRIPS = 1 << _STRIP_BITS
_DOUBLINGS = 9  # of a strip's length, from the centre outwards
_LARGEST_ACCEPTANCE_BITS = 36
_GUARD = 2.0**-44  # relative error of r in float64, with room
_WORDS_PER_BLOCK = 1 << 15  # part of what a seed means
_DIGITS = 60
_EXACT_BITS = 128


def sampler_delta(n_values: int, n_releases: int, *, epsilon: float) -> float:
    """What the sampler's cut tails add to delta, at most.

    With each value's law within t = :data:`TAIL` of the ideal one, n values of R releases are
    within n R t, for either of two neighbours, so delta grows by (1 + exp(epsilon)) n R t. It is
    additive; epsilon itself does not grow.

    Args:
        n_values: Number of values a release, e.g. trained parameters.
        n_releases: Number of releases.
        epsilon: The run's epsilon.

    Example:
        >>> sampler_delta(10**9, 1000, epsilon=10.0) < 1e-15
        True
    """
    return (1 + math.exp(min(epsilon, 700.0))) * n_values * n_releases * TAIL


def rounded_gaussian(n: int, std: float, stream: NoiseStream) -> np.ndarray:
    """Independent draws of ``round(N(0, std**2))``.

    Args:
        n: Number of draws.
        std: Standard deviation in grid steps, in [512, 2**40].
        stream: Source of the random words; equal streams give equal draws.

    Returns:
        (n,) int64.
    """
    strips = strips_for(std)
    drawn: list[np.ndarray] = [np.zeros(0, np.int64)]
    missing = n
    while missing > 0:
        block = strips.draw(stream)[:missing]
        drawn.append(block)
        missing -= len(block)
    return np.concatenate(drawn)


@dataclass(frozen=True, kw_only=True, eq=False)
class Strips:
    """The tables of one standard deviation.

    Args:
        std: In grid steps.
        bound: a, the common bound of ``relative mass * length``.
        start: (1024,) int64 first magnitude of each strip.
        mask: (1024,) int64 its length - 1.
        accept: (1024,) int64; first bits of u below this are accepted, whatever the cell.
        reject: (1024,) int64; first bits of u from this on are rejected, whatever the cell.
        cell_bits: Number of bits of a cell's number.
        acceptance_bits: Number of first bits of u.
    """

    std: float
    bound: float
    start: np.ndarray
    mask: np.ndarray
    accept: np.ndarray
    reject: np.ndarray
    cell_bits: int
    acceptance_bits: int

    def draw(self, stream: NoiseStream) -> np.ndarray:
        """Draws from one block of words; as many as are accepted."""
        words = stream.words(_WORDS_PER_BLOCK).view(np.int64)
        strip = (words >> 1) & (_STRIPS - 1)
        first = (words >> (64 - self.acceptance_bits)) & ((1 << self.acceptance_bits) - 1)
        accepted = first < self.accept[strip]
        near = np.flatnonzero(~accepted & (first < self.reject[strip]))
        if len(near):
            magnitude = self._magnitudes(words[near], strip[near])
            accepted[near] = self._decide(strip[near], magnitude, first=first[near], stream=stream)
        words = words[accepted]
        magnitude = self._magnitudes(words, strip[accepted])
        sign = -(words & 1)  # 0 or -1
        return (magnitude ^ sign) - sign

    def _magnitudes(self, words: np.ndarray, strip: np.ndarray) -> np.ndarray:
        return self.start[strip] + ((words >> (1 + _STRIP_BITS)) & self.mask[strip])

    def _decide(
        self, strip: np.ndarray, magnitude: np.ndarray, *, first: np.ndarray, stream: NoiseStream
    ) -> np.ndarray:
        """Whether u < r, exactly, for cells whose strip alone does not decide."""
        scaled = self.acceptance(strip, magnitude) * 2.0**self.acceptance_bits
        error = scaled * _GUARD
        accepted = first < np.floor(scaled - error)
        for i in np.flatnonzero(~accepted & (first <= np.floor(scaled + error))):
            bits = self.acceptance_bits + _EXACT_BITS
            high, low = (int(word) for word in stream.words(2))
            u = (int(first[i]) << _EXACT_BITS) + (high << 64) + low
            accepted[i] = u < self.exact_acceptance(int(strip[i]), int(magnitude[i]), bits=bits)
        return accepted

    def acceptance(self, strip: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """r of the cells, float64, to a relative error of 2**-44.

        The mass of cell m, over h phi(0) with h = 1 / std and z = m h, is
        ``exp(-z**2 / 2) (1 + h**2 (z**2 - 1) / 24 + h**4 (z**4 - 6 z**2 + 3) / 1920 + ...)``.
        """
        squares = np.square(magnitude / self.std)
        first, second = 1 / (24 * self.std**2), 1 / (1920 * self.std**4)
        series = second * squares + (first - 6 * second)
        series = series * squares + (1 - first + 3 * second)
        mass = np.exp(-0.5 * squares) * series
        mass[magnitude == 0] *= 0.5
        return mass * ((self.mask[strip] + 1) / self.bound)

    def exact_acceptance(self, strip: int, magnitude: int, *, bits: int) -> int:
        """``floor(r * 2**bits)`` of one cell, r to 60 digits."""
        with localcontext() as context:
            context.prec = _DIGITS
            mass = exact_mass(magnitude, self.std) * (int(self.mask[strip]) + 1)
            r = mass / Decimal(self.bound) / (1 if magnitude else 2)
            return int(r * (1 << bits))


def exact_mass(magnitude: int, std: float) -> Decimal:
    """Mass of one cell over ``phi(0) / std``, to nearly 60 digits.

    ``sum_j (h / 2)**(2 j) He_2j(z) / (2 j + 1)!`` times ``exp(-z**2 / 2)``, from the Taylor series
    of the density about the cell's centre, with He the probabilists' Hermite polynomials.
    """
    with localcontext() as context:
        context.prec = _DIGITS + 10
        h = 1 / Decimal(std)
        z = magnitude * h
        total = power = Decimal(1)
        before, hermite = Decimal(0), Decimal(1)
        for order in range(1, 31):
            before, hermite = hermite, z * hermite - (order - 1) * before
            power = power * h / 2 / (order + 1)
            if order % 2 == 0:
                total += power * hermite
        return (-z * z / 2).exp() * total


@functools.lru_cache(maxsize=64)
def strips_for(std: float) -> Strips:
    """The tables of one standard deviation, in grid steps.

    Raises:
        ValueError: ``std`` lies outside [512, 2**40].
    """
    if not MIN_STD <= std <= MAX_STD:
        raise ValueError(
            f"noise of {std!r} grid steps: must be between {MIN_STD:g} and {MAX_STD:g}"
        )
    bound, runs = _shortest_cover(std)
    length = np.concatenate([np.full(count, size, np.int64) for size, count in runs])
    start = np.concatenate([[0], np.cumsum(length)[:-1]])
    cell_bits = int(length[-1]).bit_length() - 1
    acceptance_bits = min(_LARGEST_ACCEPTANCE_BITS, 64 - 1 - _STRIP_BITS - cell_bits)
    strips = Strips(
        std=std,
        bound=bound,
        start=_padded(start),
        mask=_padded(length - 1),
        accept=_padded(np.zeros(0, np.int64)),
        reject=_padded(np.zeros(0, np.int64)),
        cell_bits=cell_bits,
        acceptance_bits=acceptance_bits,
    )
    used = np.arange(len(length))
    scale = 2.0**acceptance_bits
    largest = strips.acceptance(used, np.maximum(start, 1)) * scale  # cell 0 counts half
    smallest = strips.acceptance(used, start + length - 1) * scale
    if length[0] == 1:  # strip 0 is cell 0 alone
        largest[0] = smallest[0]
    else:
        smallest[0] = min(smallest[0], strips.acceptance(used[:1], start[:1])[0] * scale)
    strips.reject[used] = np.ceil(largest * (1 + _GUARD)).astype(np.int64) + 1
    strips.accept[used] = np.floor(smallest * (1 - _GUARD)).astype(np.int64) - 1
    return strips


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(_STRIPS, np.int64)
    padded[: len(values)] = values
    return padded


def _shortest_cover(std: float) -> tuple[float, list[tuple[int, int]]]:
    """The smallest bound (to 7 bits) with which 1024 strips reach 12 sigma, and their lengths.

    Returns:
        The bound, and (length, number of strips of it) from the centre outwards.
    """
    exponent = math.floor(math.log2(1.5 * std / _STRIPS))
    for sixtyfourths in range(64, 512):
        bound = max(1.0, math.ldexp(sixtyfourths / 64, exponent)) * (1 + 2.0**-14)
        runs = _cover(std, bound)
        if sum(count for _, count in runs) <= _STRIPS:
            return bound, runs
    raise AssertionError("no cover")


def _cover(std: float, bound: float) -> list[tuple[int, int]]:
    """(length, number) of strips with ``relative mass * length <= bound``, as long as may be."""
    length = 1 << math.floor(math.log2(bound))
    longest = length << _DOUBLINGS
    end = math.ceil(_CUT * std)
    runs: list[tuple[int, int]] = []
    at = 0
    while length <= longest and at < end:
        # cells from here on may be in strips of twice the length; 2**-15 covers the series
        limit = bound / (2 * length) / (1 + 2.0**-15)
        until = math.ceil(std * math.sqrt(max(0.0, -2 * math.log(min(limit, 1.0)))))
        if length == longest:
            until = end
        count = max(0, -(-(min(until, end) - at) // length))
        if count:
            runs.append((length, count))
        at += count * length
        length *= 2
    return runs
