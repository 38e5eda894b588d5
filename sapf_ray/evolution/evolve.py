"""Private Evolution: fresh images, then T times: vote, noise, select, vary.

Order of one iteration: candidates are embedded (public) -> records vote (tasks) -> the event is in the ledger
-> noise -> parents are selected and written -> their variations are made. Whatever is on disk is whole, so the
same call goes on after a crash at any point: a histogram whose parents are on disk is never computed again,
one that was paid for but not used is replayed exactly, which the ledger recognises.

Example::

    stage = evolution_stage(epsilon=10.0, delta=plan.delta, iterations=config.iterations, accountant="pld")
    final = evolve(parts, source, 32, config, stage, key, stream, ledger, "run/evolution", "run/private/records", seed=0)
    images, labels = final.read(np.arange(final.size)), final.labels(np.arange(final.size))

References:
    1. Lin et al. ICLR 2024, algorithm 1.
    2. Xie et al. ICML 2024, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import ModelConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.evolution.api import Api, DiffusionApi
from sapf_ray.evolution.embedding import Embedding, make_embedding
from sapf_ray.evolution.generation import Generation, Work, embed_candidates, make_samples, save_array
from sapf_ray.evolution.histogram import RecordEmbeddings, all_votes, release_histogram
from sapf_ray.evolution.population import next_parents, threshold_votes
from sapf_ray.evolution.settings import EXECUTION_ONLY, EvolutionConfig
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.privacy.streams import NoiseKey
from sapf_ray.rundir import write_atomic


@dataclass(frozen=True)
class Parts:
    """The replaceable public parts: what makes samples and what compares them."""

    api: Api
    embedding: Embedding


def make_parts(config: EvolutionConfig, model: ModelConfig, prompts: tuple[str, ...]) -> Parts:
    """A diffusion pipeline and the configured embedding. Loads nothing; checks what can be checked early.

    Raises:
        DataError: Inception weights that cannot be used.
    """
    api = DiffusionApi(model, tuple(prompts), config.steps, config.guidance_scale, config.batch_size, config.gpus_per_task)
    return Parts(api, make_embedding(config, model))


def evolve(
    parts: Parts, source: ImageSource, resolution: int, config: EvolutionConfig, stage: StagePlan | None, key: NoiseKey,
    stream: str, ledger: Ledger, directory: Path | str, private_directory: Path | str, seed: int,
    on_progress: Callable[[int, int], None] | None = None, non_private: bool = False,
) -> Generation:
    """Runs or continues an evolution.

    Args:
        parts: See :func:`make_parts`; any other that keep the protocols.
        source: The records; read only when ``config.iterations`` is above 0.
        resolution: Side in pixels at which records are read: that of the API's images.
        stage: From :func:`sapf_ray.evolution.accounting.evolution_stage`; None with 0 iterations.
        stream: Fingerprint of (key, plan, data, config), as in the other stages.
        directory: Of the generations; synthetic samples and noisy releases only.
        private_directory: Of the records' embeddings (mode 0600); the caller deletes it at the end.
        seed: Of all public randomness.
        on_progress: Called with (tasks done, tasks in all).
        non_private: Allows noise 0.

    Returns:
        The last generation: ``config.n_images`` samples, slot i of label i mod classes. What
        :func:`write_data_set` takes.

    Raises:
        ConfigError: Fewer images than classes, or a stage for another number of iterations.
        BudgetError: A histogram would pass the planned epsilon; nothing has been released.
        RunDirectoryError: ``directory`` holds an evolution of other settings.
    """
    _check(config, source, stage)
    root, n_classes = Path(directory).resolve(), len(source.class_names)
    root.mkdir(parents=True, exist_ok=True)
    _same_settings(root, config, stage, source, resolution, seed)
    work = Work(parts.api, parts.embedding, config, seed)
    records = RecordEmbeddings(str(Path(private_directory).resolve()), source.n_train, config.shard_size)
    generations = [_generation(root, config, i, n_classes) for i in range(config.iterations + 1)]
    read = len(records.shards) if config.iterations else 0  # Ray tasks of one pass over the records
    costs = [len(g.shards) + (read + len(generations[g.index - 1].shards) if g.index else 0) for g in generations]
    progress = _Progress(read + sum(costs), on_progress)

    start = max((g.index for g in generations if g.complete), default=0)
    for generation in generations[:start]:
        shutil.rmtree(generation.directory, ignore_errors=True)  # what a crash left behind
    progress(sum(costs[:start]))
    for generation in generations[start:]:
        Path(generation.directory).mkdir(exist_ok=True)
        previous = generations[generation.index - 1] if generation.index > 0 else None
        if previous is not None and generation.parents_file.exists():
            progress(costs[generation.index] - len(generation.shards))
        elif previous is not None:
            assert stage is not None
            for _ in records.build(source, resolution, parts.embedding, config):
                progress(1 if previous.index == start else 0)
            for _ in embed_candidates(work, previous):
                progress(1)
            votes = all_votes(previous.embeddings(), n_classes, records, config, lambda: progress(1))
            noisy = release_histogram(votes, previous.index, stage, key, stream, ledger, non_private)
            weights = threshold_votes(noisy, config.threshold * stage.noise_multiplier)
            save_array(generation.parents_file, next_parents(weights, n_classes, config, seed, previous.index))
        for _ in make_samples(work, generation, previous):
            progress(1)
        if previous is not None:
            shutil.rmtree(previous.directory, ignore_errors=True)
    progress.finish()
    return generations[-1]


def _generation(root: Path, config: EvolutionConfig, index: int, n_classes: int) -> Generation:
    size = config.n_images if index == config.iterations else config.candidates * n_classes
    return Generation(str(root / f"generation-{index:03d}"), index, size, n_classes, config.shard_size)


def _check(config: EvolutionConfig, source: ImageSource, stage: StagePlan | None) -> None:
    n_classes = len(source.class_names)
    if config.n_images < n_classes:
        raise ConfigError("evolution.n_images", config.n_images, f"must be at least the number of classes, {n_classes}")
    planned = stage.count if stage is not None else 0
    if planned != config.iterations or (stage is not None and stage.sample_rate != 1):
        raise ConfigError("evolution.iterations", config.iterations, f"the privacy plan is for {planned} full passes")


def _same_settings(
    root: Path, config: EvolutionConfig, stage: StagePlan | None, source: ImageSource, resolution: int, seed: int
) -> None:
    """Refuses to go on with generations that other settings made."""
    settings = {f"evolution.{k}": v for k, v in dataclasses.asdict(config).items() if k not in EXECUTION_ONLY}
    settings |= {
        "noise_multiplier": stage.noise_multiplier if stage else None, "n_records": source.n_train,
        "classes": list(source.class_names), "prompts": list(source.prompts), "resolution": resolution, "seed": seed,
    }
    path = root / "settings.json"
    if not path.exists():
        write_atomic(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); start a new run in another directory") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise RunDirectoryError(
                f"{root}: holds an evolution with {name} = {found.get(name)!r}, asked is {value!r}; use another directory"
            )


class _Progress:
    """Counts finished Ray tasks, of public number."""

    def __init__(self, total: int, callback: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.callback = 0, total, callback

    def __call__(self, tasks: int) -> None:
        self.done += tasks
        if self.callback and tasks:
            self.callback(self.done, self.total)

    def finish(self) -> None:
        self(self.total - self.done)
