"""A group as the unit of privacy against group privacy of images: docs/person-level.md's tables.

    python -m jobs.person_level step      # a training step: noise, and what stands against it
    python -m jobs.person_level head      # labels of a private head

On the public stand-in of the digits, with made-up writers of k images each, of any digits. A writer
has ε = 10 at δ = 1 / (N ln N), N writers, either way. Nothing here is released: sums are read
without noise.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq

from jobs.made_up_writers import writers
from sapf_ray.config import DataConfig, ModelConfig, from_dict
from sapf_ray.data.base import open_source
from sapf_ray.data.units import Units
from sapf_ray.finetune.adapter import add_adapter, sample_gradients
from sapf_ray.finetune.loop import FinetuneJob
from sapf_ray.finetune.objective import Objective
from sapf_ray.finetune.optimizer import Clipping
from sapf_ray.grounding.head import exact_sum, from_noisy, group_sum
from sapf_ray.grounding.head_price import MOST, directions
from sapf_ray.grounding.public_spread import GLYPHS
from sapf_ray.latents import CONDITIONS, LatentCache
from sapf_ray.models.class_head import Spread
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.feature_table import make_features
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_features import posterior_moments
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.group_privacy import group_epsilon
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import default_delta, make_plan

EPSILON = 10.0
STEPS = 60
ROWS = 520  # images that a step passes through the network, in every arm
MICRO_BATCH = 60  # of them at a time
NOISES = 20  # draws of a head's noise
MODEL = ModelConfig(path="glyphs-tiny")


@dataclass(frozen=True)
class Made:
    """The stand-in's training images, encoded, and the writers of k of them each.

    Args:
        folder: Of the encoded images.
        k: Images a writer.
    """

    folder: Path
    k: int

    @cached_property
    def units(self) -> Units:
        labels = open_source(DataConfig(source="stand_in")).labels("train")
        return Units.of([str(name) for name in writers(labels, self.k, pure=False, seed=0)])

    def cache(self, *, grouped: bool) -> LatentCache:
        """With or without the writers as units."""
        if not grouped:
            return LatentCache(str(self.folder))
        path = self.folder / f"units-{self.k}.npy"  # a process reads a file of units once
        self.units.save(path)
        return LatentCache(str(self.folder), units=str(path))

    @property
    def delta(self) -> float:
        """Of a writer."""
        return default_delta(len(self.units))


def encode(folder: Path) -> None:
    """Writes latents, public features, labels and conditions of the stand-in's images."""
    source = open_source(DataConfig(source="stand_in"))
    pipe = load_pipeline(MODEL)
    images, labels = source.read("train", np.arange(source.n_train), resolution=32)
    parts = np.array_split(images, 20)
    moments = np.concatenate([posterior_moments(pipe.vae, part) for part in parts])
    np.save(folder / "moments.npy", moments.astype(np.float32))
    np.save(folder / "features.npy", make_features("glyphs", MODEL)(images))
    np.save(folder / "labels.npy", labels.astype(np.int64))
    encode_conditions(pipe, source.prompts).save(folder / CONDITIONS)


def noise_for(rate: float, k: int, *, steps: int, delta: float) -> float:
    """Noise multiplier with which a person of k units has ``EPSILON``.

    Args:
        rate: Poisson rate of a step; 1 reads all.
        k: Units of the person.
        steps: Number of steps.
        delta: The person's.
    """

    def excess(log_noise: float) -> float:
        charges = ((gaussian_event(math.exp(log_noise), rate), steps),)
        found = group_epsilon(charges, k, delta=delta, interval=1e-2)
        return math.log(min(found, 1e4) / EPSILON)

    return math.exp(brentq(excess, math.log(0.3), math.log(60 * k), xtol=1e-3))


# A training step --------------------------------------------------------------------------------


def mean_contribution(cache: LatentCache, units: np.ndarray, *, draws: int) -> float:
    """Length of the units' mean clipped gradient at the public model, in clipping norms.

    Two halves of the units with draws of their own are multiplied, so that what is chance in each
    of them does not count.

    Args:
        cache: Whose groups are the units, where it has groups.
        units: Some of them.
        draws: Of a unit.
    """
    plan = make_plan(from_dict({"privacy": {"non_private": True}}), 10_000)  # not used
    preset = {"steps": STEPS, "timestep_start": 0.1, "timestep_end": 0.9}  # of the digits
    config = from_dict({"finetune": {**preset, "draws_per_record": draws}}).finetune
    key = NoiseKey.create(3).bind("signal")
    matrices = list(PublicModel.open(MODEL).pool("qkv"))
    job = FinetuneJob(
        model=MODEL, matrices=matrices, cache=cache, plan=plan, config=config, key=key,
        ledger="", seed=0,
    )  # fmt: skip
    objective = Objective.load(job)
    factors = add_adapter(objective.denoiser, matrices, config=config, seed=0)
    gradients = sample_gradients(objective.denoiser, factors, config=config, scale=1.0)
    clipping = Clipping.of(config)
    grid = gradients.grid_step(clipping.norm)
    sums = []
    for half in np.array_split(units, 2):
        total = torch.zeros(sum(p.numel() for p in factors.values()), dtype=torch.float64)
        for part in np.array_split(half, max(1, len(half) * draws // MICRO_BATCH)):
            clipped = gradients.clipped_units(objective.losses(part, 0), clipping, grid=grid)
            total += torch.cat([p.flatten() for p in clipped]).double() * grid
        sums.append(total / len(half))
    return math.sqrt(max(0.0, float(sums[0] @ sums[1])))


def step_rows(folder: Path, k: int) -> Iterator[dict]:
    """Noise and signal of a step that passes ``ROWS`` images, by groups and by images."""
    made = Made(folder, k)
    n, n_images = len(made.units), made.units.n_images
    arms = [("writers", n, ROWS // k, k), ("images", n_images, ROWS, 1)]
    if k > 1:
        arms.append(("images", n_images, ROWS // k, k))
    for arm, records, batch, draws in arms:
        grouped = arm == "writers"
        person = 1 if grouped else k
        noise = noise_for(batch / records, person, steps=STEPS, delta=made.delta) / batch
        units = np.random.default_rng(0).permutation(records)[: 2 * batch]
        cache = made.cache(grouped=grouped)
        signal = mean_contribution(cache, units, draws=draws)
        yield {
            "k": k, "unit": arm, "units a step": batch, "draws": draws, "noise": noise,
            "signal": signal, "signal / noise": signal / noise,
        }  # fmt: skip


# A head -----------------------------------------------------------------------------------------


def head_rows(folder: Path, k: int) -> Iterator[dict]:
    """Share of the stand-in's test images that a private head labels right."""
    made = Made(folder, k)
    source = open_source(DataConfig(source="stand_in"))
    images, labels = source.read("test", np.arange(source.n_test), resolution=32)
    seen = make_features("glyphs", MODEL)(images)
    n = len(made.units)
    whole = noise_for(1.0, 1, steps=1, delta=made.delta)
    for arm in ("writers", "images"):
        grouped = arm == "writers"
        noise = whole / math.sqrt(MOST) * (1 if grouped else k)
        records = n if grouped else made.units.n_images
        weight = math.sqrt(n * made.units.n_images) if grouped else records
        spread = Spread.load(GLYPHS)
        size = directions(weight / 10, noise, dimension=len(spread.centre))
        projection = spread.projection(size, kind="glyphs")
        cache = made.cache(grouped=grouped)
        if grouped:
            total = group_sum(cache.group_features(), projection, n_classes=10)
        else:
            total = exact_sum(cache.record_features(), projection, n_classes=10)
        right = []
        for number in range(NOISES):
            rng = np.random.default_rng(number)
            noisy = [part.numpy() + noise * rng.normal(size=part.shape) for part in total.values()]
            head = from_noisy(
                noisy, projection, noise_multiplier=noise, n_records=records, grouped=grouped
            )
            right.append((head.log_likelihoods(seen).argmax(1) == labels).mean())
        yield {
            "k": k, "unit": arm, "noise multiplier": noise, "directions": size,
            "accuracy": 100 * np.mean(right), "spread": 100 * np.std(right),
        }  # fmt: skip


TABLES = {"step": step_rows, "head": head_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5, 10], help="images a writer")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        encode(Path(folder))
        for k in given.k:
            for row in TABLES[given.table](Path(folder), k):
                shown = {
                    name: float(f"{value:.3g}") if isinstance(value, float) else value
                    for name, value in row.items()
                }
                print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
