"""The scores of a synthetic data set against real images.

Everything here reads real images outside the privacy mechanism: a non-private measurement of
research runs. A release run leaves it out (``evaluation.enabled: false``).
"""

from __future__ import annotations

from collections.abc import Mapping

from sapf_ray.config import EvaluationConfig
from sapf_ray.config.section import require
from sapf_ray.evaluation.features import FEATURES, feature_space_name
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.metrics import named, requested
from sapf_ray.evaluation.protocols import Task, epochs_in_all, protocol_of


def check_evaluation(config: EvaluationConfig, *, made: int | None = None) -> None:
    """Finds what would stop the evaluation, before a run spends hours or budget.

    Args:
        config: Settings of the evaluation.
        made: Side of the synthetic images in pixels, where it is known.

    Raises:
        ConfigError: Images are to be compared at a larger size than they are made, or the protocol
            has no such classifier or other numbers.
        DataError: Inception weights are wanted but cannot be used.
    """
    if not config.enabled:
        return
    require(
        made is None or config.resolution is None or config.resolution <= made,
        "evaluation.resolution",
        config.resolution,
        f"must be at most {made}, the side of the synthetic images",
    )
    epochs_in_all(config, Task(data="", side=made or 0))
    for key in ("epochs", "batch_size", "learning_rate"):
        value = getattr(config, key)
        require(
            not protocol_of(config).has_networks or value == getattr(EvaluationConfig(), key),
            f"evaluation.{key}",
            value,
            f"is fixed where evaluation.protocol is {config.protocol}, leave it out",
        )
    FEATURES[feature_space_name(config)].check(config)


def evaluate(inputs: Inputs) -> dict[str, float]:
    """Every metric that the settings ask for, one after the other in this process.

    Returns:
        One number for each row of :func:`sapf_ray.evaluation.metrics.requested`, under its name:
        e.g. ``fid_glyph``, ``accuracy``, ``accuracy_<classifier>`` and ``conditional_fidelity`` in
        [0, 1], the counts ``n_synthetic``, ``n_reference`` and ``n_test``.

    Raises:
        DataError: The synthetic data set is unfinished, damaged or has other classes than the
            source.
    """
    inputs.check_classes()
    scores: dict[str, float] = {}
    for name, metric in requested(inputs.config).items():
        if metric.compute is not None:
            scores |= named(name, metric.compute(inputs.restricted_to(metric.reads)))
    return combined(scores, inputs.config)


def combined(scores: Mapping[str, float], config: EvaluationConfig) -> dict[str, float]:
    """The scores, and those that are made from them."""
    made = {
        name: metric.combine(scores)
        for name, metric in requested(config).items()
        if metric.combine is not None
    }
    return {**scores, **made}
