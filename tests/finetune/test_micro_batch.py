"""How a step's records are dealt to workers and micro-batches, and what is kept of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapf_ray.finetune.micro_batch import MicroBatches, arrange, fit_threads, keep, kept


def dealt(micro_batches: MicroBatches, sampled: np.ndarray, world: int) -> list[list[int]]:
    return [
        records[:n].tolist()
        for rank in range(world)
        for records, n in micro_batches.split(sampled, rank, world=world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 40, 41])
@pytest.mark.parametrize("whole", [True, False])
def test_each_record_is_dealt_once_and_shapes_are_few(world, n, whole):
    sampled = np.arange(100, 100 + n)
    micro_batches = MicroBatches(size=16, multiple=1 if whole else 8, whole=whole)
    parts = dealt(micro_batches, sampled, world)
    assert sorted(record for part in parts for record in part) == sampled.tolist()
    if whole:  # the same micro-batches for any number of workers
        assert sorted(parts) == sorted(dealt(micro_batches, sampled, 1))
        return
    for rank in range(world):
        for records, _ in micro_batches.split(sampled, rank, world=world):
            assert len(records) in (8, 16)


def test_shapes_that_round_alike_save_padding():
    def alike(n: int) -> bytes:
        return b"same"

    def by_shape(n: int) -> bytes:
        return b"same" if n >= 16 else b"other"

    assert arrange(64, alike, per_record=True).multiple == 8
    assert arrange(64, by_shape, per_record=True).multiple == 64
    assert arrange(20, alike, per_record=True).multiple == 20
    assert arrange(64, by_shape, per_record=False).multiple == 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_threads_of_the_first_start_return_only_where_they_matter(threads):
    def by_threads(n: int) -> bytes:
        return str(torch.get_num_threads()).encode()

    found = arrange(8, by_threads, per_record=True)
    fit_threads(found, by_threads)
    assert threads() == found.threads == 1
    torch.set_num_threads(2)
    fit_threads(found, by_threads)
    assert threads() == 1
    torch.set_num_threads(2)
    fit_threads(arrange(8, lambda n: b"same", per_record=True), lambda n: b"same")
    assert threads() == 2


def test_what_was_found_is_kept_unless_another_size_is_requested(tmp_path):
    path = tmp_path / "micro_batch.json"
    assert kept(path, 0) is None
    found = MicroBatches(size=16, multiple=8, threads=2)
    keep(path, found)
    assert kept(path, 0) == kept(path, 16) == found
    assert kept(path, 32) is None
    path.write_text("{")
    assert kept(path, 0) is None
