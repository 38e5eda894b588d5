"""A metric: harmonic mean of precision and recall (Kynkäänniemi et al. 2019), on FID's features."""

from sapf_ray.evaluation.inputs import REFERENCE, SYNTHETIC, Inputs
from sapf_ray.evaluation.metrics import METRICS, Metric


def f_score(inputs: Inputs) -> float:
    """A number in [0, 1], near 1 where the sets are alike."""
    from sapf_ray.evaluation.fidelity import compare  # loads torch

    images, reference = inputs.synthetic, inputs.reference
    found = compare(images, reference, config=inputs.config, device=inputs.device, prc=True)
    return float(found["f_score"])


METRICS["f_score"] = Metric(
    title="harmonic mean of precision and recall",
    header="F score %",
    higher_is_better=True,
    reads=(SYNTHETIC, REFERENCE),
    compute=f_score,
    scale=100.0,
)
