"""What orchestration costs: the fine-tuning stage through Ray Train against the same loop in a bare process.

    python -m jobs.benchmark --out runs/bench

Both train the digits preset on public stand-in data, in turn, several times; ratios of whole-stage wall time
(start-up, loading and checkpoints included) are printed with minimum, median and maximum.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonargparse
import numpy as np
import torch.distributed as dist

from jobs.compare import with_overrides
from sapf_ray import cluster
from sapf_ray.cli import load_preset
from sapf_ray.config import RunConfig, from_dict
from sapf_ray.data.base import open_source
from sapf_ray.data.latents import LatentCache, build_latent_cache
from sapf_ray.finetune.launcher import cpus_per_worker, finetune
from sapf_ray.finetune.loop import FinetuneJob, train
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.streams import NoiseKey
from sapf_ray.rundir import write_atomic
from sapf_ray.saliency.scores import n_selected


def make_job(config: RunConfig, cache: LatentCache, n_records: int, directory: Path) -> FinetuneJob:
    """A fine-tuning job with a ledger of its own; evenly spread matrices stand for a selection."""
    plan = make_plan(config, n_records)
    Ledger.create(directory / "ledger.jsonl", plan)
    pool = list(candidate_pool(load_pipeline(config.model.path).unet))
    kept = np.linspace(0, len(pool) - 1, n_selected(len(pool), config.saliency.ratio)).round().astype(int)
    return FinetuneJob(
        config.model, [pool[i] for i in kept], cache, plan, config.finetune, NoiseKey.create(0), "benchmark",
        str(directory / "ledger.jsonl"), seed=0,
    )


def bare_process(job_file: str, threads: int) -> None:
    """The worker's loop without Ray; run by :func:`main` as a process of its own."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1)
        train(pickle.loads(Path(job_file).read_bytes()), None, lambda state: state.save(Path(directory) / "state.pt"))
        dist.destroy_process_group()


def main(out: str = "runs/bench", repeats: int = 3, steps: int | None = None) -> None:
    """Prints and writes ``results.json`` with each figure as {min, median, max}.

    Args:
        out: Directory for the results.
        repeats: Pairs of runs.
        steps: Fine-tuning steps; by default those of the preset.
    """
    overrides = {"data.source": "stand_in"} | ({"finetune.steps": steps} if steps else {})
    config = from_dict(with_overrides(load_preset("digits"), overrides))
    source = open_source(config.data)
    ratios: list[float] = []
    seconds: dict[str, list[float]] = {"bare": [], "ray_train": []}
    with tempfile.TemporaryDirectory() as temporary, cluster.session(config.cluster):
        root = Path(temporary)
        cache = build_latent_cache(root / "latents", source, config.model.path, "float32", "cpu", 512, {"num_cpus": 1})
        for repeat in range(repeats):
            pair = {}
            for kind in ("bare", "ray_train"):
                directory = root / f"{kind}{repeat}"
                directory.mkdir()
                job = make_job(config, cache, source.n_train, directory)
                start = time.monotonic()
                if kind == "bare":
                    (directory / "job.pkl").write_bytes(pickle.dumps(job))
                    arguments = f"{str(directory / 'job.pkl')!r}, {int(cpus_per_worker(job))}"
                    call = f"from jobs.benchmark import bare_process; bare_process({arguments})"
                    subprocess.run([sys.executable, "-c", call], check=True)
                else:
                    finetune(dataclasses.replace(job), directory / "checkpoints", directory / "adapter")
                pair[kind] = time.monotonic() - start
                seconds[kind].append(pair[kind])
                print(f"repeat {repeat}: {kind} {pair[kind]:.1f} s", flush=True)
            ratios.append(pair["ray_train"] / pair["bare"])
    results = {"ray_train_time_vs_bare": _spread(ratios)} | {f"seconds_{k}": _spread(v) for k, v in seconds.items()}
    Path(out).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(out) / "results.json", json.dumps(results, indent=2) + "\n")
    for name, spread in results.items():
        print(f"{name}: median {spread['median']:.3f} (min {spread['min']:.3f}, max {spread['max']:.3f}, {repeats} repeats)")


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
