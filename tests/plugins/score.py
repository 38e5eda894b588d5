"""A score: the diagonal of the Fisher information, summed over each matrix."""

from sapf_ray.grad_sample.capture import PoolCapture
from sapf_ray.privacy.clipping import Clip
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.saliency.scores import SCORES, Score


def fisher(capture: PoolCapture, clip: Clip) -> ExactSum:
    """A record's squared gradient norms, one per matrix; ``clip`` bounds them and adds them up."""
    return clip.sum([capture.norms() ** 2])


SCORES["fisher"] = Score(contribution=fisher, per_matrix=True)
