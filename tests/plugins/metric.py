"""A metric: kernel inception distance (Binkowski et al. 2018), on the features that FID uses."""

from sapf_ray.evaluation.inputs import REFERENCE, SYNTHETIC, Inputs
from sapf_ray.evaluation.metrics import METRICS, Metric


def kid(inputs: Inputs) -> float:
    """Mean over random subsets; near 0, also below it, where the sets are alike."""
    from sapf_ray.evaluation.fidelity import compare  # loads torch

    images, reference = inputs.synthetic[0], inputs.reference[0]
    options = {"kid": True, "kid_subset_size": min(1000, len(images), len(reference))}
    found = compare(images, reference, config=inputs.config, device=inputs.device, **options)
    return float(found["kernel_inception_distance_mean"])


METRICS["kid"] = Metric(
    title="kernel inception distance",
    header="KID x1000",
    higher_is_better=False,
    reads=(SYNTHETIC, REFERENCE),
    compute=kid,
    scale=1000.0,
)
