"""A whole evolution on a tiny pipeline, written as a data set."""

from __future__ import annotations

import dataclasses

import numpy as np

from sapf_ray.config import DataConfig, EvolutionConfig, ModelConfig, SynthesisConfig
from sapf_ray.data import open_source
from sapf_ray.evolution.dataset import is_written, write_data_set
from sapf_ray.evolution.evolve import Evolution, make_parts
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import evolution_stage
from sapf_ray.privacy.release import Releaser
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.writer import read_synthetic
from tests.evolution.toy import DELTA, plan_of


def test_digits_to_parquet(ray_cluster, tiny_pipeline, tmp_path):
    source, model = open_source(DataConfig()), ModelConfig(path=str(tiny_pipeline))
    config = EvolutionConfig(iterations=2, population=2, lookahead=2, strength_end=0.5)
    sampling = SynthesisConfig(n_images=23, steps=3, batch_size=10, shard_size=400)
    stage = evolution_stage(10.0, DELTA, iterations=2, accountant="rdp")
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan_of(10.0, source.n_train))
    plan = dataclasses.replace(plan_of(10.0, source.n_train), evolution=stage)
    evolution = Evolution(
        parts=make_parts(config, sampling, model=model, prompts=source.prompts),
        source=source,
        resolution=8,
        config=config,
        sampling=sampling,
        releaser=Releaser(key=NoiseKey.create(1), ledger=ledger, plan=plan),
        directory=tmp_path / "evolution",
        private_directory=tmp_path / "private",
        seed=0,
    )
    final = evolution.run()
    assert not is_written(
        tmp_path / "synthetic", 23, n_classes=10, spec="spec", seed=0, shard_size=10
    )
    manifest = write_data_set(
        final,
        tmp_path / "synthetic",
        class_names=source.class_names,
        prompts=source.prompts,
        spec="spec",
        privacy_note=PrivacyNote(text="epsilon = 10"),
        seed=0,
        shard_size=10,
    )
    images, labels = read_synthetic(tmp_path / "synthetic")
    assert (
        images.shape == (23, 8, 8, 3) and images.dtype == np.uint8 and len(manifest["shards"]) == 3
    )
    assert np.array_equal(images, final.read(np.arange(23))) and np.array_equal(
        labels, np.arange(23) % 10
    )
    assert ledger.epsilon_spent() <= 10 and len(ledger.events()) == 2
    first = tmp_path / "synthetic" / manifest["shards"][0]["file"]
    inode = first.stat().st_ino
    assert is_written(tmp_path / "synthetic", 23, n_classes=10, spec="spec", seed=0, shard_size=10)
    write_data_set(
        final,
        tmp_path / "synthetic",
        class_names=source.class_names,
        prompts=source.prompts,
        spec="spec",
        privacy_note=PrivacyNote(text=""),
        seed=0,
        shard_size=10,
    )
    assert first.stat().st_ino == inode  # whole: kept
    write_data_set(
        final,
        tmp_path / "synthetic",
        class_names=source.class_names,
        prompts=source.prompts,
        spec="other",
        privacy_note=PrivacyNote(text=""),
        seed=0,
        shard_size=10,
    )
    assert first.stat().st_ino != inode
    first.write_bytes(first.read_bytes()[:-9])
    assert not is_written(
        tmp_path / "synthetic", 23, n_classes=10, spec="other", seed=0, shard_size=10
    )
