"""Real runs inside a grid.

DP cells side by side on two cores share latents and a selection, and do not wait for each other for
ever.
"""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sapf_ray.privacy.ledger import Ledger
from sapf_ray.tune import run as tune_run
from sapf_ray.tune.grid import open_grid, run_grid
from tests.tune.test_space import write

pytestmark = pytest.mark.long


def test_private_cells_side_by_side_share_latents_and_selection(
    ray_cluster, tmp_path, tiny_pipeline, monkeypatch
):
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(
                    folder / f"{i}.png"
                )
    path = write(
        tmp_path,
        base={
            "data.source": "image_folder",
            "data.path": str(tmp_path / "images"),
            "model.path": str(tiny_pipeline),
            "finetune.steps": 2,
            "finetune.batch_size": 8,
            "finetune.micro_batch_size": 4,
            "synthesis.n_images": 4,
            "synthesis.steps": 2,
            "evaluation.enabled": False,
            "privacy.accountant": "rdp",
        },
        axes={"method": ["dp-lora", "dp-sapf"], "epsilon": [5.0, 10.0]},
    )
    seen = []
    clean = tune_run._Private.clean

    def watch(self):
        seen.extend(
            (folder.parent.name, stat.S_IMODE(folder.stat().st_mode))
            for folder in self.users
            if folder.exists()
        )
        return clean(self)

    monkeypatch.setattr(tune_run._Private, "clean", watch)
    grid = open_grid(path, str(tmp_path / "grid"), strict=True)
    report, outcome = run_grid(grid, Console(quiet=True), max_concurrent=2)
    assert not outcome.failed and not outcome.kept_private
    assert [row["runs"] for row in report.rows] == [1, 1, 1, 1]
    (release,) = (tmp_path / "grid" / ".selections").iterdir()
    assert seen and set(seen) == {(".latents", 0o700), (release.name, 0o700)}, (
        "one folder for all four cells, one for two"
    )
    assert not (tmp_path / "grid" / ".latents").exists() and not (release / "private").exists()
    selections = [
        json.loads((tmp_path / "grid" / f"dp-sapf_epsilon{e}" / "selection.json").read_text())
        for e in (5, 10)
    ]
    assert selections[0] == selections[1] == json.loads((release / "selection.json").read_text())
    ledgers = [
        Ledger.open(tmp_path / "grid" / f"dp-sapf_epsilon{e}" / "ledger.jsonl") for e in (5, 10)
    ]
    for ledger in ledgers:
        assert [e.noise_id for e in ledger.events() if e.stage == "selection"] == [
            selections[0]["event"]["noise_id"]
        ]
    assert any(
        "2 of them share one selection release, counted once" in note for note in report.notes
    )
    assert (
        "once in the ε of all of them together"
        in (tmp_path / "grid" / "dp-sapf_epsilon5" / "privacy_card.md").read_text()
    )
    for metrics in (tmp_path / "grid").glob("*/metrics.json"):
        values = json.loads(metrics.read_text())
        assert 0 < values["epsilon_spent"] <= 10 and values["peak_memory_mb"]["finetune"] > 100
        assert not (metrics.parent / "private").exists()
