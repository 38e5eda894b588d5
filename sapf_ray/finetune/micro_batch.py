"""Finds the micro-batch size: as large as memory allows, no larger than speed asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GAIN = 1.05  # a larger size that saves less time than this is not worth its memory
PATIENCE = 2  # doublings without a gain before the search ends: one may be the machine's noise
SMALLEST = 8


def find_micro_batch(run: Callable[[int], object], limit: int, *, device: str) -> int:
    """Doubles from 8 until memory or speed stops growing.

    Which size comes out depends on the machine, and changes no result beyond rounding: the clipped
    sum of a batch is the same however it is split.

    Args:
        run: Makes one forward and backward pass over that many records of *random* data.
        limit: Largest size worth trying, at least 1.
        device: Torch device string.

    Raises:
        torch.OutOfMemoryError: Not even the smallest size fits.
    """
    size = best = min(SMALLEST, limit)
    fastest = _seconds_per_record(run, best, device=device)
    in_vain = 0
    while size < limit and in_vain < PATIENCE:
        size = min(2 * size, limit)
        try:
            seconds = _seconds_per_record(run, size, device=device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if seconds * GAIN > fastest:
            in_vain += 1
        else:
            best, fastest, in_vain = size, seconds, 0
    return best


def _seconds_per_record(run: Callable[[int], object], size: int, *, device: str) -> float:
    times = []
    for _ in range(4):  # the first also allocates and picks kernels
        _wait(device)
        start = time.perf_counter()
        run(size)
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:]) / size


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
