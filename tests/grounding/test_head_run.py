"""A head in a run: one release, labels by it where it is reliable, by the prompts where not."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from sapf_ray.models.class_head import ClassHead
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis import launcher
from tests.grounding.test_stage import config_of, settings
from tests.reuse.runs import in_this_process

__all__ = ["settings"]  # the fixture


@pytest.mark.parametrize(
    ("noise", "labels"),
    [(0.5, "balance"), pytest.param(500.0, "prompt", marks=pytest.mark.long)],
)
def test_a_head_labels_images_only_where_it_is_reliable(
    ray_cluster, settings, tmp_path, monkeypatch, noise, labels
):
    if labels == "prompt":  # as without a head: the other one shows that actors get it
        monkeypatch.setattr(launcher, "_run_queue", in_this_process)
    changes = {
        "grounding.remedies": "head",
        "grounding.head_noise_multiplier": noise,
        "grounding.oversample": 1.5,
        "privacy.epsilon": 100.0,
        "finetune.steps": 0,
    }
    result = run(config_of(settings, **changes), str(tmp_path / "run"))
    directory = result.directory
    (event,) = Ledger.open(directory.ledger).events()
    assert (event.release, event.event) == ("head", result.plan.head.event())
    assert result.plan.head.noise_multiplier == noise
    (features,) = directory.latents.glob("*/features.npy")
    assert features.stat().st_mode & 0o777 == 0o600
    found = json.loads(directory.grounding.read_text())["head"]
    assert found["labels"] == labels and found["features"] == "latents"
    head = ClassHead.load(directory.head)
    assert head.useful == (labels == "balance")
    assert head.projection.size == found["directions"]
    (shard,) = directory.synthetic.glob("*.parquet")
    assert ("label_source" in pq.read_table(shard).column_names) == (labels == "balance")
    assert "grounding, head (features clipped)" in directory.card.read_text()
    card = (directory.synthetic / "README.md").read_text()
    assert ("private classifier" in card) == (labels == "balance")
