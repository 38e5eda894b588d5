"""Micro-batches: how large, and how a step's records are dealt to them.

A record's own gradient must not depend on who shares its micro-batch, on its place in it, or on
the number of workers; only then is a step executed again, by whatever number of workers, the very
same release. Measured on CPUs, place and company change nothing, while kernels for another *shape*
may round differently: a micro-batch of 3 rows gives other last bits than one of 8. So shapes are
few, and the same for any number of workers:

- Where each record has a gradient of its own (LoRA), records are dealt to the workers one by one,
  and a shorter last micro-batch is padded, with copies that are left out of the sum, to a multiple
  of 8 rows; or to the full size where a probe at the start shows that the shape matters.
- Where a micro-batch has one gradient (ghost clipping), the sample is cut into micro-batches first,
  and these are dealt: each is the same sum whoever computes it.

What the first start found is kept in the run directory (:data:`MICRO_BATCH_FILE`), so every later
one does the same. ``finetune.micro_batch_size`` wins.
The probe's hash is kept too: workers with another number of threads, whose kernels round otherwise,
go back to the first start's number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sapf_ray.files import write_json
from sapf_ray.privacy.sampling import shard

MICRO_BATCH_FILE = "micro_batch.json"

GAIN = 1.05  # a larger size that saves less time than this is not worth its memory
PATIENCE = 2  # doublings without a gain before the search ends: one may be the machine's noise
SMALLEST = 8
MULTIPLE = 8  # rows of a padded micro-batch, where the probe allows it


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How a step's records are dealt to workers and micro-batches.

    Attributes:
        size: Records of a full micro-batch.
        multiple: A shorter one is padded to a multiple of this; 1 pads nothing.
        whole: Micro-batches are dealt to the workers, rather than records.
        threads: Number of torch threads of the first start's workers.
        probe: Hash of the probe's gradients with that many.
    """

    size: int
    multiple: int
    whole: bool = False
    threads: int = 1
    probe: str = ""

    def split(
        self, sampled: np.ndarray, rank: int, *, world: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        """One worker's micro-batches of a step.

        Args:
            sampled: Indices of all records of the step.
            rank: Of the worker, in [0, world).
            world: Number of workers.

        Yields:
            Indices, of which the last ones may be padding, and the number of real ones.
        """
        mine = sampled if self.whole else shard(sampled, rank, world)
        starts = range(0, len(mine), self.size)
        for start in starts[rank::world] if self.whole else starts:
            records = mine[start : start + self.size]
            yield np.resize(records, self._padded(len(records))), len(records)

    def _padded(self, n: int) -> int:
        rows = -(-n // self.multiple) * self.multiple
        return min(rows, max(self.size, n))


def kept(path: Path, requested: int) -> MicroBatches | None:
    """What an earlier start found, or None where there is none, or none of that size.

    Args:
        path: :data:`MICRO_BATCH_FILE` of the run directory.
        requested: ``finetune.micro_batch_size``; 0 leaves the size open.
    """
    try:
        found = MicroBatches(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if requested not in (0, found.size):
        return None
    return found


def keep(path: Path, micro_batches: MicroBatches) -> None:
    """Writes what later starts read; nothing in it depends on the records."""
    write_json(path, asdict(micro_batches))


def arrange(size: int, bits: Callable[[int], bytes], *, per_record: bool) -> MicroBatches:
    """The cheapest arrangement in which no record's gradient depends on the workers.

    Args:
        size: Records of a full micro-batch.
        bits: Number of records to the bytes of one fixed random record's gradient in a micro-batch
            of so many, or of the micro-batch's own where records have none.
        per_record: Whether records have gradients of their own.
    """
    bits = functools.cache(bits)  # a pass of a large model takes seconds
    full = bits(size)
    multiple = size if per_record else 1
    if per_record and size % MULTIPLE == 0:
        shapes = {MULTIPLE, 2 * MULTIPLE, size // 2 // MULTIPLE * MULTIPLE} - {0}
        if all(bits(rows) == full for rows in shapes if rows < size):
            multiple = MULTIPLE
    found = MicroBatches(
        size=size,
        multiple=multiple,
        whole=not per_record,
        threads=torch.get_num_threads(),
    )
    return replace(found, probe=_probe(found, bits))


def fit_threads(micro_batches: MicroBatches, bits: Callable[[int], bytes]) -> None:
    """Goes back to the first start's number of threads where the present one rounds differently.

    Args:
        micro_batches: What the first start found.
        bits: As :func:`arrange` takes it.
    """
    if torch.get_num_threads() == micro_batches.threads:
        return
    if _probe(micro_batches, bits) != micro_batches.probe:
        torch.set_num_threads(micro_batches.threads)


def _probe(micro_batches: MicroBatches, bits: Callable[[int], bytes]) -> str:
    smallest = micro_batches.size if micro_batches.whole else micro_batches.multiple
    return hashlib.sha256(bits(smallest) + bits(micro_batches.size)).hexdigest()


def find_micro_batch(run: Callable[[int], object], limit: int, *, device: str) -> int:
    """Doubles from 8 until memory or speed stops growing.

    Args:
        run: Makes one forward and backward pass over that many records of *random* data.
        limit: Largest size worth trying, at least 1.
        device: Torch device string.

    Raises:
        torch.OutOfMemoryError: Not even the smallest size fits.
    """
    size = min(SMALLEST, limit)
    best = size
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
            best = size
            fastest = seconds
            in_vain = 0
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
