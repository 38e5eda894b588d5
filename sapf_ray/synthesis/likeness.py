"""What an image shows, judged by the images that look like it: a witness beside prompt and head.

Every candidate of a shard has probabilities of what it shows. Kernel ridge regression of these on
thumbnails, each image left out of its own prediction, tells what images that look alike are taken
for. A head is sure of many images that it has wrong; images of the class that it names look
different. Post-processing: nothing but synthetic images is looked at.

Where looks say nothing of the class, every prediction is near the mean, and the witness is silent.

References:
    1. Rifkin, Lippert. Notes on regularized least squares. MIT-CSAIL-TR-2007-025, 2007.
       (leave-one-out predictions in closed form)
    2. Northcutt, Jiang, Chuang. Confident learning: estimating uncertainty in dataset labels. JAIR
       2021. (predictions of images that were held out tell labels that are wrong)
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import cho_factor, cho_solve
from scipy.special import log_softmax

SIDE = 16  # pixels of a thumbnail
BLOCK = 1000  # images compared with each other; time grows with its cube
WIDTH = 0.25  # of the kernel, in median squared distances
RIDGE = 1.0
SHARPNESS = 8.0
"""Log odds of a class that is predicted with certainty against one that is excluded."""


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, R, R, 3), averaged down to float32 (n, 3 SIDE²) in [0, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(pixels, SIDE).flatten(1).numpy()


def log_likeness(small: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Log of each class's probability by the images that look alike, itself left out.

    Images are compared within blocks of at most ``BLOCK``, in their order.

    Args:
        small: float32 (m, p), from :func:`thumbnails`.
        probabilities: float64 (m, C), of what each image shows.

    Returns:
        float64 (m, C), at most 0.
    """
    parts = []
    for start in range(0, len(small), BLOCK):
        block = slice(start, start + BLOCK)
        predicted = _left_out(small[block].astype(np.float64), probabilities[block])
        parts.append(log_softmax(SHARPNESS * predicted, axis=1))
    return np.concatenate(parts)


def _left_out(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Predictions (m, C) of kernel ridge regression, each of a fit without the row itself.

    With ``H = K (K + λI)⁻¹``, the prediction without row i is ``(HY - hY)_i / (1 - h_i)``, where h
    is the diagonal of H.
    """
    squares = np.square(rows).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0)
    kernel = np.exp(-distances / max(WIDTH * float(np.median(distances)), 1e-12))
    ridge = kernel + RIDGE * np.eye(len(rows))
    fit = cho_solve(cho_factor(ridge), kernel)  # the transpose of H
    own = np.diag(fit)[:, None]
    even = 1 / targets.shape[1]
    centred = targets - even
    return (fit.T @ centred - own * centred) / (1 - own) + even
