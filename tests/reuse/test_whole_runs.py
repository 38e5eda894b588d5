"""The claim of ``sapf synthesize`` to the letter: two whole runs, and one that grew."""

from __future__ import annotations

import pytest

from sapf_ray.config import from_dict, nest
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.reuse.commands import synthesize
from tests.reuse.runs import digests


@pytest.mark.long
def test_a_first_run_with_that_number_makes_the_very_same_files(
    ray_cluster, tiny_pipeline, tmp_path
):
    flat = {
        "model.path": str(tiny_pipeline),
        "privacy.epsilon": 8.0,
        "privacy.accountant": "rdp",
        "privacy.reproducible_seed": 5,
        "finetune.batch_size": 16,
        "finetune.steps": 2,
        "synthesis.n_images": 20,
        "synthesis.shard_size": 10,
        "synthesis.batch_size": 5,
        "synthesis.steps": 2,
        "evaluation.enabled": False,
        "tracking.enabled": False,
    }
    small = run(from_dict(nest(flat)), str(tmp_path / "small"))
    large = run(from_dict(nest({**flat, "synthesis.n_images": 35})), str(tmp_path / "large"))
    ledger = small.directory.ledger.read_bytes()
    assert ledger == large.directory.ledger.read_bytes(), "one secret, one set of releases"
    grown = synthesize(small.directory.root, {"synthesis.n_images": 35})
    assert digests(grown.directory.synthetic) == digests(large.directory.synthetic)
    assert small.directory.ledger.read_bytes() == ledger
    assert grown.metrics["epsilon_spent"] == Ledger.open(large.directory.ledger).epsilon_spent()
