"""A classifier made of class means in a public feature space, that knows how noisy its means are.

Two parts. The *projection* is public: directions in which public images of different groups differ,
scaled so that images of one group have unit variance (linear discriminants), and a radius that
bounds a record. The *means* come from one noisy release
(:mod:`sapf_ray.grounding.head`); everything here is post-processing of it.

References:
    1. Fisher. The use of multiple measurements in taxonomic problems. 1936.
    2. Efron, Morris. Stein's estimation rule and its competitors. JASA 1973. (shrinkage of means)
    3. Tramèr, Boneh. Differentially private learning needs better features. ICLR 2021.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chi2

from sapf_ray.errors import DataError, reason
from sapf_ray.files import write_atomic

RIDGE = 0.05
"""Added to the variance within groups, as a share of its mean: directions of almost no public
variance are not blown up."""
LEAST_VARIANCE = 0.25
CHECKS = 200  # simulated images a class, from which a head's reliability is computed


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Public map from features to whitened discriminants.

    Attributes:
        centre: float64 (d,), mean of public features.
        directions: float64 (d, k), the most discriminating first.
        radius: Largest norm of a projected record: root mean square of public images' norms.
        kind: ``key`` of the features it was made for.
    """

    centre: np.ndarray
    directions: np.ndarray
    radius: float
    kind: str

    @property
    def size(self) -> int:
        """k, number of directions."""
        return self.directions.shape[1]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (n, d) to float64 (n, k) of norm at most ``radius``, up to rounding.

        Summed number by number: a matrix product may round an image's row differently in another
        company, and a record's contribution must depend on that record alone.
        """
        rows = np.zeros((len(features), self.size))
        for number, weights in enumerate(self.directions):
            rows += (features[:, number, None].astype(np.float64) - self.centre[number]) * weights
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows * np.minimum(1.0, self.radius / np.maximum(norms, 1e-12))


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """How public images of several groups lie in a feature space.

    Attributes:
        centre: float64 (d,), their mean.
        within: float64 (d, d), mean covariance of images of one group.
        total: float64 (d, d), covariance of all images.
    """

    centre: np.ndarray
    within: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, groups: np.ndarray) -> Spread:
        """Of features float32 (n, d), whose images belong to ``groups`` int64 (n,)."""
        rows = features.astype(np.float64)
        centre = rows.mean(0)
        rows = rows - centre
        _, numbers = np.unique(groups, return_inverse=True)
        counts = np.bincount(numbers)
        sums = np.zeros((len(counts), rows.shape[1]))
        np.add.at(sums, numbers, rows)
        rest = rows - (sums / counts[:, None])[numbers]
        freedom = max(1, len(rows) - len(counts))
        within = rest.T @ rest / freedom
        # few images for the number of directions: more of the ridge that a projection adds anyway
        lacking = max(0.0, within.shape[0] / freedom - RIDGE) * np.trace(within) / len(within)
        within += lacking * np.eye(len(within))
        return cls(centre=centre, within=within, total=rows.T @ rows / len(rows))

    @classmethod
    def load(cls, path: Path) -> Spread:
        """The one that :meth:`save` wrote."""
        with np.load(path) as file:
            return cls(**{name: file[name].astype(np.float64) for name in file.files})

    def save(self, path: Path) -> None:
        """Writes a ``.npz`` of float32 arrays; the same spread gives the same bytes."""
        sink = io.BytesIO()
        np.savez(sink, **{name: part.astype(np.float32) for name, part in asdict(self).items()})
        write_atomic(path, sink.getvalue())

    def projection(self, size: int, *, kind: str) -> Projection:
        """The ``size`` directions in which groups differ most, for their own spread.

        Args:
            size: Number of directions; at most d are there.
            kind: ``key`` of the features.
        """
        d = len(self.centre)
        ridge = RIDGE * np.trace(self.within) / d + 1e-12
        values, vectors = np.linalg.eigh(self.within + ridge * np.eye(d))
        whiten = vectors / np.sqrt(values)
        variances, turns = np.linalg.eigh(whiten.T @ self.total @ whiten)
        directions = whiten @ turns[:, ::-1][:, :size]
        # the sign of an eigenvector is arbitrary, and differs from one library to another
        largest = np.abs(directions).argmax(0)
        directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
        radius = float(np.sqrt(variances[::-1][:size].clip(min=0).sum())) or 1.0
        return Projection(centre=self.centre, directions=directions, radius=radius, kind=kind)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassHead:
    """Class means with their uncertainty. Released, or computed from what was released.

    Attributes:
        projection: Public.
        means: float64 (C, k), shrunk towards their common mean.
        mean_variance: float64 (C, k), of what is not known of the means.
        variance: Of images of one class, in each direction.
        shares: float64 (C,), estimated frequency of each class.
        reliability: Expected share of images that the head labels right, by what it knows of
            itself.
    """

    projection: Projection
    means: np.ndarray
    mean_variance: np.ndarray
    variance: float
    shares: np.ndarray
    reliability: float

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.means)

    @property
    def useful(self) -> bool:
        """Whether its labels are better than a guess by a margin: half-way, at least, to certainty
        from chance.
        """
        chance = 1 / self.n_classes
        return self.reliability >= chance + (1 - chance) / 2

    def log_likelihoods(self, features: np.ndarray) -> np.ndarray:
        """Log density of images under each class, but for a constant of the image.

        An image counts by its distance from the mean; both the spread of images and what is not
        known of the mean widen the density. Images may be spread more widely than records, so the
        spread is at least that of the given images about their nearest means.

        Args:
            features: float32 (n, d), public features.

        Returns:
            float64 (n, C).
        """
        rows = self.projection(features)
        return _log_densities(rows, self.means, self.mean_variance, self._spread(rows))

    def _spread(self, rows: np.ndarray) -> float:
        nearest = ((rows[:, None] - self.means) ** 2).mean(2).min(1)
        return max(self.variance, float(nearest.mean()))

    def save(self, path: Path) -> None:
        """Writes a ``.npz`` that :meth:`load` reads; the same head gives the same bytes."""
        values = asdict(self) | {f"projection_{k}": v for k, v in asdict(self.projection).items()}
        del values["projection"]
        sink = io.BytesIO()
        np.savez(sink, **values)
        write_atomic(path, sink.getvalue())

    @classmethod
    def load(cls, path: Path) -> ClassHead:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: Missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                values: dict[str, Any] = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a private head ({reason(error)})") from error
        projection = Projection(
            centre=values["projection_centre"],
            directions=values["projection_directions"],
            radius=float(values["projection_radius"]),
            kind=str(values["projection_kind"]),
        )
        return cls(
            projection=projection,
            means=values["means"],
            mean_variance=values["mean_variance"],
            variance=float(values["variance"]),
            shares=values["shares"],
            reliability=float(values["reliability"]),
        )


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the noise of a sum, of a count and of the energy."""

    sum: float
    count: float
    energy: float


def head_of(
    projection: Projection,
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    energy: float,
    noise: Noise,
    n_records: float,
) -> ClassHead:
    """The head that follows from noisy sums, counts and energy.

    A count is averaged with N / C, and the variance with that of the public images, which is 1: the
    more so the noisier they are. Each direction's means are shrunk towards their common mean by the
    share of their scatter that is noise. Where the scatter of all of them together is no more than
    noise would show once in a hundred times, nothing of it is believed.

    Args:
        projection: Public.
        sums: (C, k) noisy sums of projected records.
        counts: (C,) noisy counts.
        energy: Noisy sum of the squared norms of projected records.
        noise: Standard deviation of the noise of each number.
        n_records: N, or what the counts add up to without noise.
    """
    n_classes, size = sums.shape
    usual = n_records / n_classes
    # classes rarely differ by more than half
    sizes = np.maximum(_averaged(counts, noise.count, usual, prior=usual / 2), usual / 10)
    means = sums / sizes[:, None]
    unknown = np.broadcast_to((noise.sum / sizes[:, None]) ** 2, means.shape)
    common = means.mean(0)
    scatter = ((means - common) ** 2).sum(0) / max(1, n_classes - 1)
    kept = np.zeros_like(means)
    if noise.sum == 0 or _is_signal(scatter, unknown.mean(0), n_classes - 1):
        true = np.maximum(scatter - unknown.mean(0), 0.0)
        kept = true / np.maximum(true + unknown, 1e-300)
    shrunk = common + kept * (means - common)
    shares = sizes / sizes.sum()
    within = (energy / n_records - float(shares @ (shrunk**2).sum(1))) / size
    variance = float(_averaged(np.array(within), noise.energy / n_records / size, 1.0, prior=1.0))
    return ClassHead(
        projection=projection,
        means=shrunk,
        mean_variance=kept * unknown,
        variance=max(variance, LEAST_VARIANCE),
        shares=shares,
        reliability=_reliability(shrunk, kept * unknown, max(variance, LEAST_VARIANCE)),
    )


def _averaged(found: np.ndarray, noise: float, usual: float, *, prior: float) -> np.ndarray:
    """Mean of what was found and what is usual, weighted by how much each of them is unsure."""
    return (found * prior**2 + usual * noise**2) / (prior**2 + noise**2)


def _is_signal(scatter: np.ndarray, noise: np.ndarray, freedom: int) -> bool:
    """Whether means are scattered more than noise alone would but once in a hundred times."""
    statistic = float((scatter / noise).sum()) * freedom
    return statistic > chi2.ppf(0.99, freedom * len(scatter))


def _reliability(means: np.ndarray, mean_variance: np.ndarray, variance: float) -> float:
    """Share of simulated images, of means drawn from what is known of them, labelled right."""
    rng = np.random.default_rng(0)
    n_classes, size = means.shape
    right = 0
    for label in range(n_classes):
        true = means[label] + rng.normal(size=(CHECKS, size)) * np.sqrt(mean_variance[label])
        rows = true + rng.normal(size=(CHECKS, size)) * np.sqrt(variance)
        scores = _log_densities(rows, means, mean_variance, variance)
        # where all means are one, every class is as likely as the others
        right += (scores.argmax(1) == label).sum() if np.ptp(scores) > 1e-9 else CHECKS / n_classes
    return float(right / (CHECKS * n_classes))


def _log_densities(
    rows: np.ndarray, means: np.ndarray, mean_variance: np.ndarray, variance: float
) -> np.ndarray:
    wide = mean_variance + variance  # (C, k)
    squares = np.stack([((rows - m) ** 2 / w).sum(1) for m, w in zip(means, wide, strict=True)], 1)
    return -0.5 * (squares + np.log(wide).sum(1))
