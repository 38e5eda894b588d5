"""Figures of the stages on Ray: the price of orchestration, and what a second worker brings.

Sizes are those of the digits preset on public stand-in data, scaled down for the group ``workers``,
where every worker has one CPU.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from jobs.bench.figures import Spread, spread
from jobs.bench.models import evenly_spread
from jobs.bench.process import Log
from jobs.bench.timeline import Progress, Timeline
from sapf_ray import cluster
from sapf_ray.config import RunConfig, from_dict
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.errors import reason
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.latents import LatentCache, build_latent_cache
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.presets import load_preset
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.saliency.scores import n_selected
from sapf_ray.saliency.selection import select
from sapf_ray.synthesis.launcher import synthesize
from sapf_ray.tune.space import with_overrides

CPUS = 2
# by group: what orchestration costs is reported of the whole stage, as the preset has it
SIZES: dict[str, dict[str, Any]] = {
    "ray": {},
    "workers": {
        "saliency.sample_rate": 1.0,
        "finetune.steps": 30,
        "synthesis.n_images": 1000,
        "synthesis.shard_size": 50,
    },
}
CEILING_SECONDS = 6.0  # of U-Net calls that show what a second core adds on this machine
QUICK = {
    "finetune.steps": 2,
    "finetune.batch_size": 16,
    "finetune.micro_batch_size": 16,
    "synthesis.n_images": 8,
    "synthesis.shard_size": 2,
    "synthesis.batch_size": 2,
    "synthesis.steps": 2,
    "saliency.sample_rate": 0.05,
}


@dataclass(kw_only=True)
class Bench:
    """What the stages are run on."""

    config: RunConfig
    source: ImageSource
    cache: LatentCache
    root: Path
    repeats: int
    log: Log

    def directory(self) -> Path:
        """A fresh directory for one run."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def finetune_job(self, workers: int, directory: Path) -> FinetuneJob:
        """With a ledger of its own; evenly spread matrices stand for a selection."""
        plan = make_plan(self.config, self.source.n_train)
        Ledger.create(directory / "ledger.jsonl", plan)
        pool = list(candidate_pool(load_pipeline(self.config.model.path).unet))
        config = replace(self.config.finetune, num_workers=workers)
        return FinetuneJob(
            model=self.config.model,
            matrices=evenly_spread(pool, n_selected(len(pool), self.config.saliency.ratio)),
            cache=self.cache,
            plan=plan,
            config=config,
            key=NoiseKey.create(0).bind("benchmark"),
            ledger=str(directory / "ledger.jsonl"),
            seed=0,
        )


def selection(
    bench: Bench,
    workers: int,
    report: Progress,
) -> None:
    """One shard a worker: a lone shard occupies one worker.

    Worker processes stay warm between runs.
    """
    directory = bench.directory()
    plan = make_plan(bench.config, bench.source.n_train)
    ledger = Ledger.create(directory / "ledger.jsonl", plan)
    config = replace(bench.config.saliency, shard_size=-(-bench.source.n_train // workers))
    select(
        PublicModel.open(bench.config.model),
        bench.cache,
        config=config,
        releaser=Releaser(key=NoiseKey.create(0), ledger=ledger, plan=plan),
        on_progress=report,
    )


def finetuning(
    bench: Bench,
    workers: int,
    report: Progress,
) -> None:
    directory = bench.directory()
    job = bench.finetune_job(workers, directory)
    job = replace(job, config=replace(job.config, cpus_per_worker=1.0))
    finetune(
        job,
        directory / "checkpoints",
        adapter_dir=directory / "adapter",
        on_progress=report,
    )


def synthesis(
    bench: Bench,
    workers: int,
    report: Progress,
) -> None:
    config = replace(bench.config.synthesis, num_actors=workers, cpus_per_actor=1.0)
    source = bench.source
    synthesize(
        bench.directory(),
        PublicModel.open(bench.config.model),
        adapter_dir=None,
        class_names=source.class_names,
        prompts=source.prompts,
        config=config,
        seed=0,
        privacy_note=PrivacyNote(text=""),
        on_progress=report,
    )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How one stage is timed.

    Attributes:
        run: (bench, workers, progress) runs the stage once.
        images: Images of one run.
        settled: Progress at which all of ``workers`` are at work; None where nothing has to start.
    """

    run: Callable[[Bench, int, Progress], None]
    images: Callable[[RunConfig, int], float]
    settled: Callable[[RunConfig, int], int] | None


STAGES = {
    "selection": Stage(
        run=selection,
        images=lambda c, n: n * c.saliency.sample_rate,
        settled=None,
    ),
    "finetune": Stage(
        run=finetuning,
        images=lambda c, n: c.finetune.steps * c.finetune.batch_size,
        settled=lambda c, workers: 1,
    ),
    "synthesis": Stage(
        run=synthesis,
        images=lambda c, n: c.synthesis.n_images,
        settled=lambda c, workers: workers * c.synthesis.shard_size,
    ),
}


@ray.remote(num_cpus=1)
def _denoising_calls(model: str, seconds: float) -> float:
    """Calls per second of the denoiser on one thread.

    It is work of no stage, and talks to no other process.
    """
    torch.set_num_threads(1)
    unet = load_pipeline(model).unet
    size = unet.config.sample_size
    width = unet.config.cross_attention_dim
    inputs = (
        torch.randn(32, unet.config.in_channels, size, size),
        torch.tensor(10),
        torch.randn(32, 77, width),
    )
    calls = 0
    start = time.monotonic()
    with torch.inference_mode():
        while time.monotonic() - start < seconds:
            unet(*inputs)
            calls += 1
    return calls / (time.monotonic() - start)


def machine_ceiling(bench: Bench) -> Spread:
    """Speed of two processes that share nothing against one.

    No stage can scale better on these cores.
    """
    model = bench.config.model.path
    ratios = []
    for _ in range(bench.repeats + 1):  # the first starts the processes
        alone = ray.get(_denoising_calls.remote(model, CEILING_SECONDS))
        ratios.append(
            sum(ray.get([_denoising_calls.remote(model, CEILING_SECONDS) for _ in range(2)]))
            / alone
        )
    return spread(ratios[1:])


def workers2(bench: Bench) -> tuple[dict[str, Spread], dict[str, Any]]:
    """One worker and two in turn.

    Whole stages, and rates once the workers are at work (``_after_start_up``).
    """
    figures: dict[str, Spread] = {"workers2_machine_ceiling": machine_ceiling(bench)}
    bench.log(
        "  two processes that share nothing: "
        f"{figures['workers2_machine_ceiling']['median']:.2f} times one"
    )
    absolute: dict[str, Any] = {}
    for name, stage in STAGES.items():
        images = stage.images(bench.config, bench.source.n_train)
        lines: dict[int, list[Timeline]] = {1: [], 2: []}
        if name == "selection":
            stage.run(
                bench, 2, lambda done, total: None
            )  # starts the worker processes that later runs share
        for _ in range(bench.repeats):
            for workers, runs in lines.items():
                runs.append(Timeline.of(partial(stage.run, bench, workers)))
                bench.log(f"  {name}, {workers} workers: {runs[-1].seconds:.1f} s")
        figures[f"workers2_speedup_{name}"] = spread(
            [a.seconds / b.seconds for a, b in zip(*lines.values(), strict=True)]
        )
        settled = stage.settled
        if settled is not None:
            rates = {
                w: [line.rate(settled(bench.config, w)) for line in runs]
                for w, runs in lines.items()
            }
            pairs = [b / a for a, b in zip(*rates.values(), strict=True) if a and b]
            if pairs:
                figures[f"workers2_speedup_{name}_after_start_up"] = spread(pairs)
        for workers, runs in lines.items():
            seconds = spread([line.seconds for line in runs])
            absolute[f"{name}/{workers} workers"] = {
                "device": "cpu",
                "images_per_step": images,
                "seconds": seconds,
                "images_per_s": images / seconds["median"],
            }
    return figures, absolute


def _bare(bench: Bench) -> None:
    directory = bench.directory()
    job = bench.finetune_job(1, directory)
    (directory / "job.pkl").write_bytes(pickle.dumps(job))
    arguments = [str(directory / "job.pkl"), str(int(cluster.worker_cpus(job.config)))]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.bench.bare", *arguments], check=True
    )


def _by_ray_train(bench: Bench) -> None:
    directory = bench.directory()
    finetune(
        bench.finetune_job(1, directory),
        directory / "checkpoints",
        adapter_dir=directory / "adapter",
    )


def ray_train(bench: Bench) -> tuple[dict[str, Spread], dict[str, Any]]:
    """The fine-tuning stage by Ray Train against the same loop in a bare process.

    Both have all cores, in turn.

    Start-up, loading, checkpoints and the adapter are included. A bare run of two steps goes first,
    unmeasured: it pays for reading the libraries from disk.
    """
    kinds = {"bare": _bare, "ray_train": _by_ray_train}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    _bare(
        replace(
            bench, config=replace(bench.config, finetune=replace(bench.config.finetune, steps=2))
        )
    )
    for _ in range(bench.repeats):
        for kind, stage in kinds.items():
            start = time.monotonic()
            stage(bench)
            seconds[kind].append(time.monotonic() - start)
            bench.log(f"  {kind}: {seconds[kind][-1]:.1f} s")
    images = STAGES["finetune"].images(bench.config, 0)
    absolute = {
        f"ray/{kind}": {
            "device": "cpu",
            "images_per_step": images,
            "seconds": spread(times),
            "images_per_s": images / spread(times)["median"],
        }
        for kind, times in seconds.items()
    }
    pairs = zip(seconds["ray_train"], seconds["bare"], strict=True)
    return {"ray_train_time_vs_bare": spread([a / b for a, b in pairs])}, absolute


GROUPS = {"ray": ray_train, "workers": workers2}


def run(
    groups: list[str],
    repeats: int,
    *,
    quick: bool,
    log: Log,
    overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Spread], dict[str, Any], dict[str, str]]:
    """Figures, absolute numbers and failures of the named groups, on one local Ray of two cores.

    Args:
        groups: Rows of :data:`GROUPS`.
        repeats: Number of rounds.
        quick: Small sizes: shows that everything runs, not how fast.
        log: Called with one line per event.
        overrides: Dotted config keys.
    """
    common = {"data.source": "stand_in", "cluster.num_cpus": CPUS}

    def config_of(group: str) -> RunConfig:
        size = QUICK if quick else SIZES[group]
        changes = common | size | (overrides or {})
        return from_dict(with_overrides(load_preset("digits"), changes))

    config = config_of(groups[0])
    source = open_source(config.data)
    figures: dict[str, Spread] = {}
    absolute: dict[str, Any] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary, cluster.session(config.cluster):
        root = Path(temporary)
        cache = build_latent_cache(
            root / "latents",
            source,
            model=config.model,
            shard_size=512,
        )
        for group in groups:
            log(f"{group}: stages of the digits preset, {CPUS} cores")
            bench = Bench(
                config=config_of(group),
                source=source,
                cache=cache,
                root=root,
                repeats=repeats,
                log=log,
            )
            try:
                ratios, numbers = GROUPS[group](bench)
            except Exception as error:
                failures[group] = f"{type(error).__name__}: {reason(error)}"
                log(f"  {failures[group]}")
                continue
            figures |= ratios
            absolute |= numbers
    return figures, absolute, failures
