"""Table of metrics: the one place that knows which scores there are.

A metric is a row of :data:`METRICS`. The evaluation computes it, ``metrics.json`` and MLflow store
it under the row's name, and the terminal, a grid's tables, its progress lines and the figures show
it as the row says. A row added from outside the package is treated like any other:

>>> METRICS["spread"] = Metric(
...     title="largest standard deviation of a batch's pixels",
...     higher_is_better=None,
...     reads=(SYNTHETIC,),
...     compute=lambda inputs: max(float(batch.std()) for batch in inputs.synthetic.batches()),
... )
>>> shown("spread", 31.456)
'31.46'
>>> del METRICS["spread"]

Whatever reads real images does so outside the privacy mechanism: a non-private measurement of
research runs, which the privacy card lists. Importing this module loads no network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from sapf_ray.config import EvaluationConfig
from sapf_ray.evaluation.classifiers import CLASSIFIERS, Build
from sapf_ray.evaluation.inputs import SYNTHETIC, TEST, TRAIN, Inputs
from sapf_ray.evaluation.metric import Metric, Score
from sapf_ray.evaluation.protocols import protocol_of, quick_recipe
from sapf_ray.evaluation.set_scores import SET_METRICS
from sapf_ray.registry import Registry

ACCURACY = "accuracy"
FIDELITY = "conditional_fidelity"
JUDGE = "judge_accuracy"
_PER_CLASSIFIER = f"{ACCURACY}_"


def _has_train(config: EvaluationConfig) -> bool:
    return config.test_images == "split"


def _accuracy(name: str, build: Build, inputs: Inputs) -> float:
    from sapf_ray.evaluation.downstream import accuracy_on_test  # torch

    # the row itself travels to the task: it need not be in the table there
    recipe = quick_recipe(inputs.config, build)
    if protocol_of(inputs.config).has_networks:
        recipe = protocol_of(inputs.config).recipe(inputs.config, name, inputs.task)
    return accuracy_on_test(
        recipe,
        inputs.synthetic,
        inputs.test,
        n_classes=len(inputs.class_names),
        seed=inputs.seed,
        device=inputs.device,
    )


def _mean_accuracy(scores: Mapping[str, float]) -> float:
    parts = [value for name, value in scores.items() if name.startswith(_PER_CLASSIFIER)]
    return float(sum(parts) / len(parts))


def _fidelity(inputs: Inputs) -> Score:
    from sapf_ray.evaluation.judge import fidelity_and_judge  # torch

    found = fidelity_and_judge(inputs)
    return {} if found is None else {FIDELITY: found[0], JUDGE: found[1]}


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        ACCURACY: Metric(
            title="accuracy on real test images",
            header="accuracy %",
            higher_is_better=True,
            reads=(SYNTHETIC, TEST),
            combine=_mean_accuracy,
            scale=100.0,
            unit="%",
            format=".1f",
            paper_key="paper_acc",
        ),
        FIDELITY: Metric(
            title="conditional fidelity (not private)",
            header="conditional fidelity %",
            higher_is_better=True,
            reads=(SYNTHETIC, TRAIN, TEST),
            compute=_fidelity,
            when=_has_train,
            scale=100.0,
            unit="%",
            format=".1f",
        ),
        JUDGE: Metric(
            title="accuracy of conditional fidelity's judge on real test images",
            higher_is_better=None,
            reads=(TRAIN, TEST),
            when=_has_train,
            headline=False,
        ),
        **SET_METRICS,
        "n_synthetic": Metric(
            title="synthetic images",
            higher_is_better=None,
            compute=lambda inputs: inputs.n_synthetic,
            cheap=True,
            headline=False,
        ),
        "n_reference": Metric(
            title="real images that FID compares with",
            higher_is_better=None,
            compute=lambda inputs: inputs.n_reference,
            cheap=True,
            headline=False,
        ),
        "n_test": Metric(
            title="real test images",
            higher_is_better=None,
            compute=lambda inputs: inputs.source.n_test,
            cheap=True,
            headline=False,
        ),
        "synthesis_idle_share": Metric(
            title="share of the sampling actors' time spent waiting",
            higher_is_better=False,
            headline=False,
        ),
    },
)
"""Key in ``metrics.json`` to metric, in the order in which tables show them."""


def requested(config: EvaluationConfig) -> dict[str, Metric]:
    """The rows that these settings ask for, and one for each classifier, which come first because
    they take longest.
    """
    per_classifier = {
        f"{_PER_CLASSIFIER}{name}": Metric(
            title=f"accuracy of {name} on real test images",
            higher_is_better=True,
            reads=(SYNTHETIC, TEST),
            compute=functools.partial(_accuracy, name, CLASSIFIERS[name]),
            headline=False,
        )
        for name in config.classifiers
    }
    chosen = {name: metric for name, metric in METRICS.items() if metric.when(config)}
    return {**per_classifier, **chosen}


def named(name: str, score: Score) -> dict[str, float]:
    """What a metric's ``compute`` returned, by the names under which it is stored."""
    return dict(score) if isinstance(score, Mapping) else {name: score}


def read_for(config: EvaluationConfig, known: Iterable[str] = ()) -> frozenset[str]:
    """What the rows that these settings ask for read, without those whose score is known."""
    if not config.enabled:
        return frozenset()
    known = set(known)
    missing = [metric for name, metric in requested(config).items() if name not in known]
    return frozenset(what for metric in missing if metric.compute for what in metric.reads)


def known_scores(saved: Mapping[str, Any]) -> dict[str, float]:
    """The scores among the keys of a ``metrics.json``, which a run started again keeps."""
    return {
        name: value
        for name, value in saved.items()
        if name in METRICS or name.startswith(_PER_CLASSIFIER)
    }


def headline() -> dict[str, Metric]:
    """The rows that tables and figures show."""
    return {name: metric for name, metric in METRICS.items() if metric.headline}


def shown(name: str, value: float) -> str:
    """A stored score as people read it, e.g. ``75.3%``."""
    metric = METRICS[name]
    return f"{value * metric.scale:{metric.format}}{metric.unit}"


def from_real_images(names: Iterable[str]) -> list[str]:
    """Those of the scores named that were computed from real images."""
    return [
        name
        for name in names
        if name.startswith(_PER_CLASSIFIER) or (name in METRICS and METRICS[name].reads_real_images)
    ]
