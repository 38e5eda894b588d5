"""A downstream classifier: logistic regression on the pixels."""

from torch import nn

from sapf_ray.evaluation.classifiers import CLASSIFIERS


def logistic(n_classes: int, side: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, n_classes))


CLASSIFIERS["logistic"] = logistic
