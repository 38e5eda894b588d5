"""A whole run on the bundled DiT: the same stages, the same ledger; and evolution on it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from sapf_ray.config import RunConfig, from_dict
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.errors import ConfigError
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis.writer import read_synthetic


def config(**sections: dict[str, Any]) -> RunConfig:
    small = {
        "model": {"path": "glyphs-dit-tiny"},
        "privacy": {"epsilon": 8.0, "accountant": "rdp", "reproducible_seed": 3},
        "saliency": {
            "shard_size": 1300
        },  # one task: a second worker process would cost its imports
        "finetune": {"batch_size": 16, "steps": 3, "checkpoint_every": 3, "micro_batch_size": 16},
        "synthesis": {"n_images": 20, "steps": 3, "shard_size": 20, "num_actors": 1},
        "evaluation": {"enabled": False},
        "tracking": {"enabled": False},
        "cluster": {"num_cpus": 2},
    }
    return from_dict(
        {
            name: {**small.get(name, {}), **sections.get(name, {})}
            for name in small.keys() | sections.keys()
        }
    )


@pytest.mark.long
def test_run_on_a_dit_spends_what_was_planned(ray_cluster, tmp_path):
    result = run(config(), str(tmp_path / "run"))
    root = tmp_path / "run"
    ledger = Ledger.open(root / "ledger.jsonl")
    assert (
        ledger.epsilon_spent() == pytest.approx(result.plan.composed_epsilon, rel=1e-6)
        and result.plan.composed_epsilon <= 8
    )
    selection = json.loads((root / "selection.json").read_text())
    assert len(selection["scores"]) == 18 and len(selection["matrices"]) == 6
    factors = load_file(root / "adapter" / "pytorch_lora_weights.safetensors")
    assert {name.split(".lora_")[0] for name in factors} == {
        f"transformer.{name}" for name in selection["matrices"]
    }
    assert max(float(value.abs().max()) for name, value in factors.items() if "lora_B" in name) > 0
    images, labels = read_synthetic(root / "synthetic")
    assert images.shape == (20, 32, 32, 3) and np.bincount(labels).tolist() == [2] * 10


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"saliency": {"pool": "cross_q"}}, "cross-attention"),
        (
            {"model": {"path": "glyphs-dit-tiny", "class_labels": (1, 2)}},
            r"model\.class_labels.*10 different label ids",
        ),
    ],
)
def test_what_does_not_fit_a_dit_is_told_before_anything_is_written(sections, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(config(**sections), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_evolution_works_on_a_dit():
    from sapf_ray.config import ModelConfig
    from sapf_ray.evolution.api import DiffusionApi

    api = DiffusionApi(
        model=ModelConfig(path="glyphs-dit-tiny"),
        prompts=DATA_SETS["digits"].prompts,
        steps=4,
        guidance_scale=2.0,
    )
    labels, seeds = np.array([3, 5]), np.array([1, 2])
    fresh = api.random(labels, seeds)
    near, far = api.vary(fresh, labels, seeds, 0.1), api.vary(fresh, labels, seeds, 0.9)
    assert fresh.shape == near.shape == (2, 32, 32, 3)
    change = [np.abs(varied.astype(float) - fresh).mean() for varied in (near, far)]
    assert change[0] < change[1]
