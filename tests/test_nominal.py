"""A whole run under a nominal N: the true number of images is in nothing that leaves it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sapf_ray.runs.directory import RunDirectory
from tests.whole_run import BARE, ONE_CORE, STEPS, command, finish

THERE, NOMINAL = 71, 80  # training images, and what the plan takes for their number
EVOLVES = ("--evolution.enabled=true", "--finetune.steps=0", "--evolution.iterations=2")
TRUE_NUMBER = re.compile(rf"(?<![\d.]){THERE}(?![\d.])")


def images_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", THERE), ("test", 10)):
        for i in range(n):
            path = root / split / "ab"[i % 2] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), EVOLVES], ids=["training", "evolution"])
def test_the_true_number_enters_nothing_that_is_released(flags, tiny_pipeline, tmp_path):
    images_folder(tmp_path / "images")
    run = command(tmp_path / "images", tiny_pipeline, tmp_path / "run", *BARE, *ONE_CORE)
    finish([*run, f"--data.n_records={NOMINAL}", *flags])
    directory = RunDirectory(tmp_path / "run")
    plan = json.loads(directory.plan.read_text())
    assert (plan["n_records"], plan["adjacency"]) == (NOMINAL, "add_or_remove_one")
    card = directory.card.read_text()
    assert f"{NOMINAL} (nominal: data.n_records)" in card and "add/remove one image" in card
    charged = len(directory.ledger.read_text().splitlines()) - 1
    assert charged == 2 if flags else charged >= STEPS
    if not flags:
        assert plan["sample_rate"] == 16 / NOMINAL
    texts = [
        path
        for released in directory.released
        for path in ([released] if released.is_file() else released.rglob("*"))
        if path.suffix in (".json", ".jsonl", ".md", ".yaml")
    ]
    assert len(texts) > 5
    assert [path.name for path in texts if TRUE_NUMBER.search(path.read_text())] == []
