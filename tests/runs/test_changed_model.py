"""Weights that change between two starts of a run: other noise, charged or refused, and said."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sapf_ray.privacy.ledger import Ledger
from tests.test_pipeline import (  # noqa: F401  the fixture is used by its name
    command,
    environment,
    folder,
    kill_when,
    releases,
)

FAST = ["--evaluation.enabled", "false", "--synthesis.n_images", "10", "--synthesis.steps", "1"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def perturb(model: Path) -> None:
    """What an in-place update of the model would do: the same path, almost the same numbers."""
    weights = load_file(model / UNET)
    for value in weights.values():
        value.mul_(1.001)
    save_file(weights, model / UNET, metadata={"format": "pt"})


@pytest.mark.parametrize("changed", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_repeated_selection_is_free_only_with_the_same_weights(
    folder,  # noqa: F811
    tiny_pipeline,
    tmp_path,
    changed,
):
    """The selection is made twice: its result was lost with the first start."""
    model, out = shutil.copytree(tiny_pipeline, tmp_path / "model"), tmp_path / "run"
    words = command(folder, model, out, *FAST)
    kill_when(words, lambda: any("finetune" in name for name in releases(out / "ledger.jsonl")))
    (out / "selection.json").unlink()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if changed:
        perturb(model)
    again = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=280)

    selections = [e for e in Ledger.open(out / "ledger.jsonl").events() if e.stage == "selection"]
    charged = {event.noise_id for event in selections if not event.replay}
    warned = "the public model's files changed since this run began" in again.stderr
    assert warned == changed
    assert len(charged) == (2 if changed else 1), "equal noise must never meet unequal sums"
    assert again.returncode == (2 if changed else 0), again.stderr[-2000:]
    if changed:
        assert "would raise epsilon" in again.stderr
        assert again.stderr.count("\n") == 2  # the warning and the refusal, one line each
