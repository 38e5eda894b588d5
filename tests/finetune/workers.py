"""Runs a function on ranks 0..world-1 of a gloo group, each a process of its own, and collects what
they return.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(
    rank: int, world: int, directory: str, function: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world
    )
    try:
        Path(directory, f"result-{rank}").write_bytes(pickle.dumps(function(*arguments)))
    finally:
        dist.destroy_process_group()


def run_ranks(
    world: int, directory: Path, function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """``function(*arguments)`` on every rank; results in rank order. Errors of a rank are raised
    here.
    """
    directory.mkdir(parents=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # a server that has imported everything once, and forks ranks from there
    multiprocessing.set_forkserver_preload(
        ["sapf_ray.finetune.loop", "sapf_ray.finetune.optimizer", "torch._dynamo"]
    )
    mp.start_processes(
        _entry,
        (world, str(directory), function, arguments),
        nprocs=world,
        start_method="forkserver",
    )
    return [pickle.loads(Path(directory, f"result-{rank}").read_bytes()) for rank in range(world)]
