"""The fine-tuning stage without Ray: the floor of the group ``ray``.

Imports what the loop needs and no more.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from sapf_ray.finetune.loop import TrainState, train, write_adapter
from sapf_ray.finetune.objective import Objective


def main(job_file: str, threads: int) -> None:
    """Trains the pickled :class:`sapf_ray.finetune.loop.FinetuneJob` of ``job_file``.

    Checkpoints and adapter are included.
    """
    torch.set_num_threads(threads)
    job = pickle.loads(Path(job_file).read_bytes())
    states: list[TrainState] = []
    with tempfile.TemporaryDirectory() as directory:

        def checkpoint(state: TrainState) -> None:
            state.save(Path(directory) / "state.pt")
            states[:] = [state]

        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=0,
            world_size=1,
        )
        objective = Objective.load(job)
        train(job, None, checkpoint, objective=objective)
        dist.destroy_process_group()
        write_adapter(
            job,
            states[-1],
            denoiser=objective.denoiser,
            directory=Path(directory) / "adapter",
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
