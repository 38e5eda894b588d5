"""Real runs inside a grid: DP cells side by side on two cores share latents, and do not wait for each other for ever."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sapf_ray.tune import run as tune_run
from sapf_ray.tune.grid import open_grid, run_grid
from tests.tune.test_space import write

pytestmark = pytest.mark.long


def test_private_cells_side_by_side_share_latents(ray_cluster, tmp_path, tiny_pipeline, monkeypatch):
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    path = write(
        tmp_path, base={
            "data.source": "image_folder", "data.path": str(tmp_path / "images"), "model.path": str(tiny_pipeline),
            "finetune.steps": 2, "finetune.batch_size": 8, "finetune.micro_batch_size": 4, "synthesis.n_images": 4,
            "synthesis.steps": 2, "evaluation.enabled": False, "privacy.accountant": "rdp",
        }, axes={"method": ["dp-lora", "dp-sapf"], "seed": [0, 1]},
    )
    seen = []
    clean = tune_run._Latents.clean

    def watch(self):
        seen.extend((folder.name, stat.S_IMODE(folder.stat().st_mode)) for folder in self.users if folder.exists())
        return clean(self)

    monkeypatch.setattr(tune_run._Latents, "clean", watch)
    grid = open_grid(path, str(tmp_path / "grid"), strict=True)
    report, outcome = run_grid(grid, Console(quiet=True), max_concurrent=2)
    assert not outcome.failed and not outcome.kept_latents
    assert [row["runs"] for row in report.rows] == [2, 2]
    assert seen and set(seen) == {(seen[0][0], 0o700)}, "one folder for all four cells"
    assert not (tmp_path / "grid" / ".latents").exists()
    for metrics in (tmp_path / "grid").glob("*/metrics.json"):
        values = json.loads(metrics.read_text())
        assert 0 < values["epsilon_spent"] <= 10 and values["peak_memory_mb"]["finetune"] > 100
        assert not (metrics.parent / "private").exists()
