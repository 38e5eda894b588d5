"""Weights that change between two starts of a run: other noise, charged or refused, and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sapf_ray import steps
from sapf_ray.privacy.ledger import Ledger
from tests.commands import call
from tests.whole_run import BARE, command

UNET = "unet/diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    pass


def perturb(model: Path) -> None:
    """What an in-place update of the model would do: the same path, almost the same numbers."""
    weights = load_file(model / UNET)
    for value in weights.values():
        value.mul_(1.001)
    save_file(weights, model / UNET, metadata={"format": "pt"})


@pytest.mark.parametrize("changed", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_repeated_selection_is_free_only_with_the_same_weights(
    folder, tiny_pipeline, tmp_path, ray_cluster, monkeypatch, capsys, caplog, changed
):
    """The selection is made twice: its result was lost with the first start."""
    model, out = shutil.copytree(tiny_pipeline, tmp_path / "model"), tmp_path / "run"
    words = command(folder, model, out, *BARE, "--synthesis.n_images=10")[3:]

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(steps, "finetune", die)
        with pytest.raises(Killed):
            call(capsys, *words)
    (out / "selection.json").unlink()
    if changed:
        perturb(model)
    code, _, said = call(capsys, *words)

    selections = [e for e in Ledger.open(out / "ledger.jsonl").events() if e.stage == "selection"]
    charged = {event.noise_id for event in selections if not event.replay}
    warned = "the public model's files changed since this run began" in caplog.text
    assert warned == changed
    assert len(charged) == (2 if changed else 1), "equal noise must never meet unequal sums"
    assert code == (2 if changed else 0), said
    if changed:
        assert "would raise epsilon" in said
        assert said.count("\n") == 1
        events = (out / "run.log.jsonl").read_text()
        assert "workers_lost" not in events, "no restart helps where the budget is spent"
