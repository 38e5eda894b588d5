"""Private Evolution in the plane: stand-ins for every part, to be computed in the head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sapf_ray.config import EvolutionConfig, SynthesisConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.evolution.evolve import Evolution, Parts
from sapf_ray.evolution.generation import Generation
from sapf_ray.methods import METHODS
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, evolution_stage
from sapf_ray.privacy.release import Releaser

DELTA = 1e-5
KEY = NoiseKey.create(7)
PE, AUG_PE = (
    {
        key.removeprefix("evolution."): value
        for key, value in METHODS[name].overrides.items()
        if key.startswith("evolution.")
    }
    for name in ("pe", "aug-pe")
)
SAMPLING = SynthesisConfig(n_images=61, shard_size=45)
CENTRES = np.array([[4.0, 0.0], [-3.0, 3.0], [0.0, -5.0]])


def normals(seeds: np.ndarray) -> np.ndarray:
    return np.stack([np.random.default_rng(int(seed)).normal(size=2) for seed in seeds])


@dataclass(frozen=True)
class PointApi:
    """Points spread widely about 0, the same in each class; a variation is a step of length
    ``3 * strength``.
    """

    def random(self, labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return 4 * normals(seeds)

    def vary(
        self, samples: np.ndarray, labels: np.ndarray, seeds: np.ndarray, strength: float
    ) -> np.ndarray:
        return samples + 3 * strength * normals(seeds)


@dataclass(frozen=True)
class PointEmbedding:
    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return samples.astype(np.float32)


class PointSource(ImageSource):
    """Records of three classes, tightly about one centre each; classes of unequal size."""

    name = "points"

    def __init__(self, n: int = 400) -> None:
        self.class_names = self.prompts = ("a", "b", "c")
        self.n_train, self.n_test = n, 0

    def labels(self, split: str) -> np.ndarray:
        return np.random.default_rng(0).choice(3, self.n_train, p=[0.5, 0.3, 0.2])

    def read(
        self, split: str, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labels(split)
        points = CENTRES[labels] + 0.3 * np.random.default_rng(1).normal(size=(self.n_train, 2))
        return points[indices], labels[indices]

    def fingerprint(self) -> str:
        return "points"

    def verify(self, splits=()) -> None:
        pass


class UnreadableSource(PointSource):
    def read(
        self, split: str, indices: np.ndarray, *, resolution: int
    ) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("a record was read")


def plan_of(epsilon: float, n: int = 400, accountant: str = "rdp") -> PrivacyPlan:
    return PrivacyPlan(
        epsilon=epsilon,
        delta=DELTA,
        accountant=accountant,
        n_records=n,
        batch_size=0,
        sample_rate=0.0,
        steps=0,
        selection=None,
        finetune=None,
        composed_epsilon=epsilon,
    )


@dataclass
class Toy:
    """One evolution in a directory of its own; ``run`` starts it or goes on with it."""

    root: Path
    config: EvolutionConfig
    epsilon: float = 20.0
    sampling: SynthesisConfig = SAMPLING
    source: ImageSource | None = None
    key: NoiseKey = KEY

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.stage = evolution_stage(
            self.epsilon, DELTA, iterations=self.config.iterations, accountant="rdp"
        )
        path = self.root / "ledger.jsonl"
        self.ledger = (
            Ledger.open(path) if path.exists() else Ledger.create(path, plan_of(self.epsilon))
        )

    def run(self, seed: int = 3, on_progress=None) -> Generation:
        plan = dataclasses.replace(plan_of(self.epsilon), evolution=self.stage)
        evolution = Evolution(
            parts=Parts(PointApi(), PointEmbedding()),
            source=self.source or PointSource(),
            resolution=8,
            config=self.config,
            sampling=self.sampling,
            releaser=Releaser(key=self.key, ledger=self.ledger, plan=plan),
            directory=self.root / "evolution",
            private_directory=self.root / "private" / "records",
            seed=seed,
        )
        return evolution.run(on_progress)


def all_samples(generation: Generation) -> np.ndarray:
    return generation.read(np.arange(generation.size))


def distance_to_centres(samples: np.ndarray) -> float:
    """Mean distance of the samples to their own class's centre."""
    return float(np.linalg.norm(samples - CENTRES[np.arange(len(samples)) % 3], axis=1).mean())
