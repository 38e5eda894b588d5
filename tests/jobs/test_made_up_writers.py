"""Made-up writers of the digits: everyone has k images, pure ones of one digit."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.made_up_writers import writers


@pytest.mark.parametrize("pure", [False, True])
def test_a_writer_has_k_images_and_a_pure_one_writes_one_digit(pure):
    labels = np.random.default_rng(0).integers(0, 10, 1297)
    owner = writers(labels, 5, pure=pure, seed=1)
    sizes = np.bincount(owner)
    assert sizes.max() == 5 and sizes.min() >= 1
    assert (sizes < 5).sum() <= (10 if pure else 1)
    digits = [len(np.unique(labels[owner == writer])) for writer in range(len(sizes))]
    assert max(digits) == 1 if pure else np.mean(digits) > 3
    assert not np.array_equal(owner, writers(labels, 5, pure=pure, seed=2))
