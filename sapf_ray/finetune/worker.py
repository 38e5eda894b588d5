"""What runs in each Ray Train worker.

Imports are inside: Ray's controller process, which only hands the function on, is spared five
seconds of them.
"""

from __future__ import annotations


def run_worker(parameters: dict) -> list[tuple[float, float]]:
    """Trains with the worker's share of the cores, from the last checkpoint on.

    Args:
        parameters: ``job``, a pickled :class:`sapf_ray.finetune.loop.FinetuneJob`; ``cpus``, the
            worker's cores; ``storage``, path or URI of this Ray Train run;
            ``adapter``, the folder that rank 0 writes at the end.

    Returns:
        When it was at work; Ray Train hands on rank 0's.
    """
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    import ray.cloudpickle as cloudpickle
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.collective import broadcast_from_rank_zero

    from sapf_ray.finetune.checkpoints import STATE_FILE, load_state, newest
    from sapf_ray.finetune.loop import TrainState, train, write_adapter
    from sapf_ray.finetune.objective import Objective
    from sapf_ray.models.device import pick_device
    from sapf_ray.runs.worktime import Laps

    torch.set_num_threads(max(1, int(parameters["cpus"])))
    job = cloudpickle.loads(parameters["job"])
    job = replace(job, device=pick_device(job.config.gpus))
    first = ray.train.get_context().get_world_rank() == 0
    # one rank looks, for on shared storage another may not see the newest yet
    name, resume = newest(parameters["storage"]) if first else (None, None)
    name = broadcast_from_rank_zero(name)
    if name is not None and not first:
        resume = load_state(parameters["storage"], name)

    def on_checkpoint(state: TrainState) -> None:
        metrics = {"step": state.step}
        if not first:
            with laps.pause():
                ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            state.save(Path(directory) / STATE_FILE)
            with laps.pause():
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    laps = Laps()
    objective = Objective.load(job)
    state = train(job, resume, on_checkpoint, objective=objective)
    if first:  # here, where the model is loaded already; the driver loads no weights
        write_adapter(
            job, state, denoiser=objective.denoiser, directory=Path(parameters["adapter"])
        )
    return laps.end()
