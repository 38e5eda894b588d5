"""Private Evolution: fresh images, then T times: vote, noise, select, vary.

Order of one iteration: candidates are embedded (public) -> records vote (tasks) -> the event is in
the ledger -> noise -> parents are selected and written -> their variations are made. Whatever is on
disk is whole, so the same call goes on after a crash at any point: a histogram whose parents are on
disk is never computed again, one that was paid for but not used is replayed exactly, which the
ledger recognises.

Example::

    final = evolve(
        make_parts(config, sampling, model, source.prompts), source, 32, config, sampling,
        plan.evolution, key, stream, ledger, "run/evolution", "run/private/records", seed=0,
    )
    images, labels = final.read(np.arange(final.size)), final.labels(np.arange(final.size))

References:
    1. Lin et al. ICLR 2024, algorithm 1.
    2. Xie et al. ICML 2024, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapf_ray.config import EXECUTION_ONLY, EvolutionConfig, ModelConfig, SynthesisConfig, flatten
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.evolution.api import Api, DiffusionApi
from sapf_ray.evolution.embedding import Embedding, make_embedding
from sapf_ray.evolution.generation import Generation, Work, embed_candidates, make_samples
from sapf_ray.evolution.histogram import RecordEmbeddings, all_votes, release_histogram
from sapf_ray.evolution.population import next_parents, threshold_votes
from sapf_ray.files import write_array, write_json
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import StagePlan


@dataclass(frozen=True)
class Parts:
    """The replaceable public parts: what makes samples and what compares them."""

    api: Api
    embedding: Embedding


def make_parts(
    config: EvolutionConfig,
    sampling: SynthesisConfig,
    *,
    model: ModelConfig,
    prompts: Sequence[str],
) -> Parts:
    """A diffusion pipeline and the configured embedding. Loads nothing; checks what can be checked
    early.

    Raises:
        DataError: Inception weights that cannot be used.
    """
    api = DiffusionApi(
        model=model,
        prompts=tuple(prompts),
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        batch_size=sampling.batch_size,
        gpus=config.gpus_per_task,
    )
    return Parts(api, make_embedding(config, model, batch_size=sampling.batch_size))


def evolve(
    parts: Parts,
    source: ImageSource,
    *,
    resolution: int,
    config: EvolutionConfig,
    sampling: SynthesisConfig,
    stage: StagePlan,
    key: NoiseKey,
    stream: str,
    ledger: Ledger,
    directory: Path | str,
    private_directory: Path | str,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
    non_private: bool = False,
) -> Generation:
    """Runs or continues an evolution.

    Args:
        parts: See :func:`make_parts`; any other that keep the protocols.
        source: The records.
        resolution: Side in pixels at which records are read: that of the API's images.
        sampling: Number of images, and of images or records per task.
        stage: The plan's ``evolution``.
        stream: Fingerprint of (key, plan, data, config), as in the other stages.
        directory: Of the generations; synthetic samples and noisy releases only.
        private_directory: Of the records' embeddings (mode 0600); the caller deletes it at the end.
        seed: Of all public randomness.
        on_progress: Called with (tasks done, tasks in all).
        non_private: Allows noise 0.

    Returns:
        The last generation: ``sampling.n_images`` samples, slot i of label i mod classes. What
        :func:`write_data_set` takes.

    Raises:
        ConfigError: Fewer images than classes, or a stage for another number of iterations.
        BudgetError: A histogram would pass the planned epsilon; nothing has been released.
        RunDirectoryError: ``directory`` holds an evolution of other settings.
    """
    check_evolution(config, sampling, source=source, stage=stage)
    root, n_classes = Path(directory).resolve(), len(source.class_names)
    root.mkdir(parents=True, exist_ok=True)
    _same_settings(
        root,
        config,
        sampling=sampling,
        stage=stage,
        source=source,
        resolution=resolution,
        seed=seed,
    )
    work = Work(api=parts.api, embedding=parts.embedding, config=config, seed=seed)
    records = RecordEmbeddings(
        directory=str(Path(private_directory).resolve()),
        n_records=source.n_train,
        shard_size=sampling.shard_size,
    )
    generations = [
        _generation(root, config, sampling=sampling, index=i, n_classes=n_classes)
        for i in range(config.iterations + 1)
    ]
    read = len(records.shards)  # Ray tasks of one pass over the records
    costs = [
        len(g.shards) + (read + len(generations[g.index - 1].shards) if g.index else 0)
        for g in generations
    ]
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
            for _ in records.build(source, resolution, parts.embedding, config):
                progress(1 if previous.index == start else 0)
            for _ in embed_candidates(work, previous):
                progress(1)
            votes = all_votes(
                previous.embeddings(),
                n_classes,
                records=records,
                config=config,
                on_shard=lambda: progress(1),
            )
            noisy = release_histogram(
                votes,
                previous.index,
                stage=stage,
                key=key,
                stream=stream,
                ledger=ledger,
                non_private=non_private,
            )
            weights = threshold_votes(noisy, config.threshold * stage.noise_multiplier)
            parents = next_parents(
                weights,
                n_classes,
                config=config,
                n_images=sampling.n_images,
                seed=seed,
                iteration=previous.index,
            )
            write_array(generation.parents_file, parents)
        for _ in make_samples(work, generation, previous):
            progress(1)
        if previous is not None:
            shutil.rmtree(previous.directory, ignore_errors=True)
    progress.finish()
    return generations[-1]


def _generation(
    root: Path, config: EvolutionConfig, *, sampling: SynthesisConfig, index: int, n_classes: int
) -> Generation:
    size = sampling.n_images if index == config.iterations else config.candidates * n_classes
    return Generation(
        directory=str(root / f"generation-{index:03d}"),
        index=index,
        size=size,
        n_classes=n_classes,
        shard_size=sampling.shard_size,
    )


def check_evolution(
    config: EvolutionConfig, sampling: SynthesisConfig, *, source: ImageSource, stage: StagePlan
) -> None:
    """What can be checked before a record is read.

    Raises:
        ConfigError: Fewer images than classes, or a stage for another number of iterations.
    """
    n_classes = len(source.class_names)
    if sampling.n_images < n_classes:
        raise ConfigError(
            "synthesis.n_images",
            sampling.n_images,
            f"must be at least the number of classes, {n_classes}",
        )
    if stage.count != config.iterations or stage.sample_rate != 1:
        raise ConfigError(
            "evolution.iterations",
            config.iterations,
            f"the privacy plan is for {stage.count} full passes",
        )


def _same_settings(
    root: Path,
    config: EvolutionConfig,
    *,
    sampling: SynthesisConfig,
    stage: StagePlan,
    source: ImageSource,
    resolution: int,
    seed: int,
) -> None:
    """Refuses to go on with generations that other settings made."""
    values = flatten(
        {"evolution": dataclasses.asdict(config), "synthesis": dataclasses.asdict(sampling)}
    )
    settings = {key: value for key, value in values.items() if key not in EXECUTION_ONLY}
    settings |= {
        "noise_multiplier": stage.noise_multiplier,
        "n_records": source.n_train,
        "classes": list(source.class_names),
        "prompts": list(source.prompts),
        "resolution": resolution,
        "seed": seed,
    }
    path = root / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise RunDirectoryError(
            f"{path}: damaged ({error}); start a new run in another directory"
        ) from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise RunDirectoryError(
                f"{root}: holds an evolution with {name} = {found.get(name)!r}, "
                f"requested is {value!r}; use another directory"
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
