"""Grounding in a run: one release, other prompts everywhere after, and free replays."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline

from sapf_ray.config import RunConfig, from_dict, nest
from sapf_ray.errors import ConfigError
from sapf_ray.grounding import stage as stage_module
from sapf_ray.models.conditions import Conditions
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.reuse.commands import synthesize
from tests.tiny import DIGITS

CANDIDATES = [f"an image of the {word}" for word in (*DIGITS, "digit", "image", "an")]


@pytest.fixture
def settings(tiny_pipeline, tmp_path) -> dict[str, object]:
    """A run of seconds on real digits, whose vote has 13 candidates."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(CANDIDATES))
    return {
        "model.path": str(tiny_pipeline),
        "privacy.accountant": "rdp",
        "saliency.shard_size": 700,
        "grounding.remedies": "vote",
        "grounding.candidates": str(words),
        "grounding.candidate_images": 4,
        "finetune.batch_size": 16,
        "finetune.steps": 2,
        "synthesis.n_images": 10,
        "synthesis.steps": 2,
        "evaluation.enabled": False,
        "tracking.enabled": False,
        "privacy.reproducible_seed": 3,
        "cluster.keep_cache": True,
    }


def config_of(settings: dict[str, object], **changes: object) -> RunConfig:
    return from_dict(nest({**settings, **changes}))


def test_assigned_prompts_are_used_from_then_on_and_a_kill_replays_for_free(
    ray_cluster, settings, tmp_path, monkeypatch
):
    """The kill falls between the release and the file that holds what follows from it.

    The driver loads no weights in any stage; workers are processes of their own, which that patch
    does not reach.
    """
    config = config_of(settings)

    def killed(*arguments):
        raise KeyboardInterrupt

    def refuse(*arguments, **options):
        raise AssertionError("the driver loads weights")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, str(tmp_path / "run"))
    result = run(config, str(tmp_path / "run"))
    directory = result.directory
    events = Ledger.open(directory.ledger).events()
    assert [(e.release, e.replay) for e in events] == [
        ("vote", False),
        ("vote", True),
        ("selection", False),
        ("finetune/step/0", False),
        ("finetune/step/1", False),
    ]
    assert result.metrics["epsilon_spent"] == pytest.approx(result.plan.composed_epsilon, rel=1e-6)
    grounding = json.loads(directory.grounding.read_text())
    prompts = list(grounding["prompts"].values())
    assert grounding["remedies"] == ["vote"] and len(set(prompts)) == 10
    assert set(prompts) <= set(CANDIDATES)
    (shard,) = directory.synthetic.glob("*.parquet")
    assert pq.read_table(shard)["prompt"].to_pylist() == prompts
    card = directory.card.read_text()
    assert f"| {prompts[3]} |" in card and "grounding, vote (one vote an image)" in card
    (latents,) = directory.latents.iterdir()
    files = sorted(latents.glob("conditions*"))
    first, second = (Conditions.load(path).states for path in files)
    assert not torch.equal(first, second), "the images were encoded once"


@pytest.mark.long
def test_without_training_the_public_model_shows_the_assigned_prompts(
    ray_cluster, settings, tmp_path
):
    result = run(config_of(settings, **{"finetune.steps": 0}), str(tmp_path / "run"))
    assert [e.release for e in Ledger.open(result.directory.ledger).events()] == ["vote"]
    assert not result.directory.adapter.exists() and result.directory.grounding.exists()
    assert 0 < result.metrics["epsilon_spent"] <= 10
    prompts = json.loads(result.directory.grounding.read_text())["prompts"]
    more = synthesize(tmp_path / "run", {"synthesis.n_images": 13})
    (shard,) = more.directory.synthetic.glob("*.parquet")
    ten = list(prompts.values())
    assert pq.read_table(shard)["prompt"].to_pylist() == ten + ten[:3]


def test_too_few_candidates_are_refused_before_anything_is_begun(settings, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a\nb\n")
    with pytest.raises(ConfigError, match="must hold a prompt for each of the 10 classes, has 2"):
        run(config_of(settings, **{"grounding.candidates": str(few)}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
