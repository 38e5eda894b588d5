"""Private Evolution: fresh images, then T times: vote, noise, select, vary.

Order of one iteration: candidates are embedded (public) -> records vote (tasks) -> the event is in
the ledger -> noise -> parents are selected and written -> their variations are made. Whatever is on
disk is whole, so the same call goes on after a crash at any point: a histogram whose parents are on
disk is never computed again, one that was paid for but not used is replayed exactly, which the
ledger recognises.

Example::

    evolution = Evolution(
        parts=make_parts(config, sampling, model=model, prompts=source.prompts), source=source,
        resolution=32, config=config, sampling=sampling, releaser=releaser,
        directory=Path("run/evolution"), private_directory=Path("run/private/records"), seed=0,
    )
    final = evolution.run()
    images = final.read(np.arange(final.size))

References:
    1. Lin et al. ICLR 2024, algorithm 1.
    2. Xie et al. ICML 2024, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sapf_ray.config import EXECUTION_ONLY, EvolutionConfig, ModelConfig, SynthesisConfig, flatten
from sapf_ray.data.base import ImageSource
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.evolution.api import Api, DiffusionApi
from sapf_ray.evolution.embedding import Embedding, make_embedding
from sapf_ray.evolution.generation import Generation, Work, embed_candidates, make_samples
from sapf_ray.evolution.histogram import RecordEmbeddings, all_votes, release_histogram
from sapf_ray.evolution.population import next_parents, threshold_votes
from sapf_ray.files import write_array, write_json
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.privacy.release import Releaser


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
        gpus=config.gpus,
    )
    return Parts(api, make_embedding(config, model, batch_size=sampling.batch_size))


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """One evolution; :meth:`run` starts it or goes on with it.

    Args:
        parts: See :func:`make_parts`; any other that keep the protocols.
        source: The records.
        resolution: Side in pixels at which records are read: that of the API's images.
        config: The section ``evolution``.
        sampling: Number of images, and of images or records per task.
        releaser: Pays and draws; its plan's ``evolution`` fixes the histograms' noise.
        directory: Folder of the generations; synthetic samples and noisy releases only.
        private_directory: Folder of the records' embeddings (mode 0600); the caller deletes it at
            the end.
        seed: Seed of all public randomness.
        units: File of the groups that have one vote each; empty where each record has its own.
    """

    parts: Parts
    source: ImageSource
    resolution: int
    config: EvolutionConfig
    sampling: SynthesisConfig
    releaser: Releaser
    directory: Path
    private_directory: Path
    seed: int
    units: str = ""

    @property
    def stage(self) -> StagePlan:
        """The plan's histograms."""
        stage = self.releaser.plan.evolution
        assert stage is not None
        return stage

    @property
    def n_classes(self) -> int:
        """Number of classes; slot i of a generation is of class i mod this."""
        return len(self.source.class_names)

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> Generation:
        """Runs or continues the evolution.

        Args:
            on_progress: Called with (tasks done, tasks in all).

        Returns:
            The last generation: ``sampling.n_images`` samples, slot i of label i mod classes. What
            :func:`write_data_set` takes.

        Raises:
            ConfigError: Fewer images than classes, or a stage for another number of iterations.
            BudgetError: A histogram would pass the planned epsilon; nothing has been released.
            RunDirectoryError: ``directory`` holds an evolution of other settings.
        """
        check_evolution(self.config, self.sampling, source=self.source, stage=self.stage)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        generations = [self._generation(i) for i in range(self.config.iterations + 1)]
        costs = self._costs(generations)
        progress = _Progress(len(self._records.shards) + sum(costs), on_progress)

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
                parents = self._select_parents(
                    previous, progress, first_of_start=previous.index == start
                )
                write_array(generation.parents_file, parents)
            for _ in make_samples(self._work, generation, previous):
                progress(1)
            if previous is not None:
                shutil.rmtree(previous.directory, ignore_errors=True)
        progress.finish()
        return generations[-1]

    def _select_parents(
        self, candidates: Generation, progress: _Progress, *, first_of_start: bool
    ) -> np.ndarray:
        """Vote, release, threshold, select: the parents of the next generation.

        Args:
            candidates: The generation that is voted on.
            progress: Counts tasks.
            first_of_start: Whether the records' embeddings are still to be counted.
        """
        embedding = self.parts.embedding
        records = self._records
        embedded = records.build(
            self.source, resolution=self.resolution, embedding=embedding, config=self.config
        )
        for _ in embedded:
            progress(1 if first_of_start else 0)
        for _ in embed_candidates(self._work, candidates):
            progress(1)
        votes = all_votes(
            candidates.embeddings(),
            self.n_classes,
            records=records,
            config=self.config,
            on_shard=lambda: progress(1),
        )
        noisy = release_histogram(votes, candidates.index, self.releaser, whole=records.whole)
        weights = threshold_votes(noisy, self.config.threshold * self.stage.noise_multiplier)
        return next_parents(
            weights,
            self.n_classes,
            config=self.config,
            n_images=self.sampling.n_images,
            seed=self.seed,
            iteration=candidates.index,
        )

    @property
    def _work(self) -> Work:
        return Work(
            api=self.parts.api,
            embedding=self.parts.embedding,
            config=self.config,
            seed=self.seed,
        )

    @property
    def _records(self) -> RecordEmbeddings:
        return RecordEmbeddings(
            directory=str(self.private_directory.resolve()),
            n_records=self.source.n_train,
            units=self.units,
            shard_size=self.sampling.shard_size,
        )

    def _generation(self, index: int) -> Generation:
        size = self.config.candidates * self.n_classes
        if index == self.config.iterations:
            size = self.sampling.n_images
        return Generation(
            directory=str(self.directory.resolve() / f"generation-{index:03d}"),
            index=index,
            size=size,
            n_classes=self.n_classes,
            shard_size=self.sampling.shard_size,
        )

    def _costs(self, generations: list[Generation]) -> list[int]:
        """Number of Ray tasks that each generation takes, the records' embeddings aside."""
        costs = [len(generations[0].shards)]
        for previous, generation in itertools.pairwise(generations):
            costs.append(len(generation.shards) + len(self._records.shards) + len(previous.shards))
        return costs

    def _check_settings(self) -> None:
        """Refuses to go on with generations that other settings made."""
        settings = json.loads(json.dumps(self._settings()))  # as the file has them
        path = self.directory / "settings.json"
        if not path.exists():
            write_json(path, settings)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"{path}: damaged ({error}); start a new run in another directory"
            ) from error
        for name, value in settings.items():
            if found.get(name) != value:
                raise RunDirectoryError(
                    f"{self.directory}: holds an evolution with {name} = {found.get(name)!r}, "
                    f"requested is {value!r}; use another directory"
                )

    def _settings(self) -> dict[str, Any]:
        """All that the generations depend on, by name."""
        sections = {
            "evolution": dataclasses.asdict(self.config),
            "synthesis": dataclasses.asdict(self.sampling),
        }
        values = flatten(sections)
        settings = {key: value for key, value in values.items() if key not in EXECUTION_ONLY}
        return settings | {
            "noise_multiplier": self.stage.noise_multiplier,
            "n_records": self.source.n_train,
            "classes": list(self.source.class_names),
            "prompts": list(self.source.prompts),
            "resolution": self.resolution,
            "seed": self.seed,
        }


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


class _Progress:
    """Counts finished Ray tasks, of public number."""

    def __init__(self, total: int, callback: Callable[[int, int], None] | None) -> None:
        self.done = 0
        self.total = total
        self.callback = callback

    def __call__(self, tasks: int) -> None:
        self.done += tasks
        if self.callback and tasks:
            self.callback(self.done, self.total)

    def finish(self) -> None:
        self(self.total - self.done)
