"""``sapf audit`` from images to report, on a tiny model: canaries in every stage of a real run."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from tests.whole_run import BARE, command, finish


@pytest.mark.long
@pytest.mark.timeout(280)
def test_a_run_is_made_audited_and_found_to_keep_its_claim(tmp_path, folder, tiny_pipeline):
    out = tmp_path / "run"
    words = command(
        folder,
        tiny_pipeline,
        out,
        *BARE,
        "--audit.canaries=300",
        "--audit.images=12",
        "--audit.mechanism_runs=200",
        "--json",
    )
    words[words.index("run")] = "audit"
    report = json.loads(finish(words).strip().splitlines()[-1])
    assert report["falsified"] == []
    found = {finding["audit"]: finding for finding in report["findings"]}
    assert found["noise of the releases"]["shown"] == pytest.approx(1.0, abs=0.1)
    assert found["releases without a ledger line"]["shown"] == 0
    assert "12 images" in found["adapter: loss of crafted images"]["note"]
    assert "12 images" in found["synthetic images: nearest one"]["note"]
    names = {path.stem for path in (out / "audit" / "observations").glob("*.npy")}
    assert {"coins", "selection", "finetune-step-0"} <= names
    held = np.load(out / "audit" / "observations" / "finetune-step-0.npy")
    assert len(held) == 300
    assert "NOT FOR RELEASE" in (out / "privacy_card.md").read_text()
    assert json.loads((out / "plan.json").read_text())["canaries"] == 312
    assert not (out / "private").exists()
    again = [sys.executable, "-m", "sapf_ray.cli", "audit", str(out), "--json"]
    assert json.loads(finish(again))["epsilon"] == report["epsilon"]
