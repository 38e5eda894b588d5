"""Rows of metrics that compare the set of synthetic images with the set of real ones.

All come from the same features, which one task extracts once: FID (Heusel et al. 2017), and by
``evaluation.scores`` kernel distance (Binkowski et al. 2018), precision and recall (Kynkäänniemi et
al. 2019), Inception score (Salimans et al. 2016) and FID class by class. Formulas are
torch-fidelity's. Importing this module loads no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sapf_ray.config import EvaluationConfig
from sapf_ray.evaluation.features import FEATURES, FeatureSpace, feature_space_name
from sapf_ray.evaluation.inputs import REFERENCE, SYNTHETIC, Inputs
from sapf_ray.evaluation.metric import Metric, Score
from sapf_ray.registry import Registry


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """What ``evaluation.scores`` asks for by one name: one row of metrics, or several.

    Attributes:
        titles: Name of each row to its name in prose.
        compute: Name of the function of :mod:`sapf_ray.evaluation.set_values` that makes them.
        higher_is_better: Direction.
        reads: What is read.
        scale: As :class:`Metric`, like the rest.
        unit: Text behind the shown number.
        format: Of the shown number.
    """

    titles: dict[str, str]
    compute: str
    higher_is_better: bool
    reads: tuple[str, ...] = (SYNTHETIC, REFERENCE)
    scale: float = 1.0
    unit: str = ""
    format: str = ".2f"


FID = SetScore(titles={"fid": "FID"}, compute="fid_of", higher_is_better=False)
SCORES: Registry[SetScore] = Registry(
    "evaluation.scores",
    {
        "kid": SetScore(
            titles={"kid": "kernel distance (KID x 1000)"},
            compute="kid_of",
            higher_is_better=False,
            scale=1000.0,
            format=".3f",
        ),
        "precision_recall": SetScore(
            titles={
                "precision": "precision: synthetic images like a real one",
                "recall": "recall: real images like a synthetic one",
            },
            compute="precision_recall_of",
            higher_is_better=True,
            scale=100.0,
            unit="%",
            format=".1f",
        ),
        "inception_score": SetScore(
            titles={"inception_score": "Inception score"},
            compute="inception_score_of",
            higher_is_better=True,
            reads=(SYNTHETIC,),
        ),
        "fid_per_class": SetScore(
            titles={
                "fid_per_class": "FID class by class, mean",
                "fid_worst_class": "FID class by class, worst",
            },
            compute="fid_per_class_of",
            higher_is_better=False,
        ),
    },
)
"""Name in ``evaluation.scores`` to rows."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """How rows of one feature space are called.

    Attributes:
        features: A row of :data:`sapf_ray.evaluation.features.FEATURES`.
        suffix: Behind each row's name.
        prose: Behind each title.
    """

    features: str
    suffix: str
    prose: str


SPACES = (
    Space(features="inception", suffix="", prose="Inception"),
    Space(features="glyph", suffix="_glyph", prose="glyph features, not Inception"),
)


def _compute(name: str, space: FeatureSpace, suffix: str, inputs: Inputs) -> Score:
    from sapf_ray.evaluation import set_values  # torch

    found: dict[str, float] = getattr(set_values, name)(inputs, space)
    return {f"{key}{suffix}": value for key, value in found.items()}


def _wanted(features: str, score: str) -> Callable[[EvaluationConfig], bool]:
    def wanted(config: EvaluationConfig) -> bool:
        return feature_space_name(config) == features and (not score or score in config.scores)

    return wanted


def _rows(space: Space, asked: str, score: SetScore) -> dict[str, Metric]:
    """The first row of a score computes all of them."""
    rows = {}
    private = "; not private" if asked and REFERENCE in score.reads else ""
    for number, (name, title) in enumerate(score.titles.items()):
        first = name == "fid" and not space.suffix
        rows[f"{name}{space.suffix}"] = Metric(
            title=f"{title} ({space.prose}{private})",
            header=_header(title, space),
            higher_is_better=score.higher_is_better,
            reads=score.reads,
            # the row itself travels to the task: it need not be in the table there
            compute=None
            if number
            else partial(_compute, score.compute, FEATURES.entered()[space.features], space.suffix),
            when=_wanted(space.features, asked),
            work="features",
            scale=score.scale,
            unit=score.unit,
            format=score.format,
            paper_key="paper_fid" if first else None,
        )
    return rows


def _header(title: str, space: Space) -> str:
    return f"glyph {title} (not Inception)" if space.suffix else title


SET_METRICS: dict[str, Metric] = {
    name: row
    for asked, score in (("", FID), *SCORES.entered().items())
    for space in SPACES
    for name, row in _rows(space, asked, score).items()
}
"""Name of a row to the row."""
