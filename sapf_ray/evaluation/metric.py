"""What a row of the table of metrics says; the rows are in :mod:`sapf_ray.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sapf_ray.config import EvaluationConfig
from sapf_ray.evaluation.inputs import REFERENCE, TEST, TRAIN, Inputs

_REAL = frozenset({TEST, TRAIN, REFERENCE})

Score = float | Mapping[str, float]
"""What a metric computes: its own number, or that and those of other rows, by name."""


def _always(config: EvaluationConfig) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One score of a run. A row without ``compute`` and ``combine`` is recorded by a stage itself.

    Attributes:
        title: Name in full, for the table at a run's end.
        higher_is_better: Direction; None where a value is neither good nor bad.
        reads: What it is computed from (:mod:`sapf_ray.evaluation.inputs`); ``compute`` is refused
            anything else. Empty: no image.
        compute: From the inputs to the stored number, or to several by name, where rows without
            ``compute`` come out of the same work. Runs as a Ray task of its own.
        combine: From the other scores of the run to the stored number; ``reads`` is then what those
            were computed from.
        when: Whether these settings ask for it.
        work: Name of the Ray task, where rows share work: those of one name are computed one after
            the other in the same process.
        cheap: Computed at once where the tasks are started, instead of in a task.
        headline: Shown in tables and figures; the others stand in ``metrics.json`` and MLflow only.
        header: Short name, for column heads and axes; the title where empty.
        scale: Factor between the stored and the shown number, e.g. 100 for percent.
        unit: Text behind the shown number.
        format: Format spec of the shown number of one run.
        column_format: Format spec in tables over many runs.
        paper_key: Key of the same score in the paper's tables, where these have it.
    """

    title: str
    higher_is_better: bool | None
    reads: tuple[str, ...] = ()
    compute: Callable[[Inputs], Score] | None = None
    combine: Callable[[Mapping[str, float]], float] | None = None
    when: Callable[[EvaluationConfig], bool] = _always
    work: str = ""
    cheap: bool = False
    headline: bool = True
    header: str = ""
    scale: float = 1.0
    unit: str = ""
    format: str = ".2f"
    column_format: str = ".1f"
    paper_key: str | None = None

    @property
    def reads_real_images(self) -> bool:
        return not _REAL.isdisjoint(self.reads)

    @property
    def short(self) -> str:
        return self.header or self.title
