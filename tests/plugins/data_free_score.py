"""A data-free score: the mean magnitude of a matrix's public weights. It costs no privacy."""

import torch

from sapf_ray.saliency.scores import SCORES, Public, Score


def magnitude(public: Public) -> torch.Tensor:
    return torch.stack([matrix.weight.abs().mean() for matrix in public.pool.values()])


SCORES["magnitude"] = Score(data_free=magnitude, reads_weights=True)
