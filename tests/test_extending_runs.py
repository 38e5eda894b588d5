"""Whole runs of things from outside the package, from the command line (see test_extending)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_extending import own_model

__all__ = ["own_model"]  # a fixture

pytestmark = pytest.mark.long


def ran(out: Path, plugins: Sequence[str], **options: Any) -> dict[str, Any]:
    """The metrics of a run from the command line, in processes that know of no test."""
    small = {
        "out": out,
        "plugins": json.dumps([f"tests.plugins.{name}" for name in plugins]),
        "privacy.epsilon": 8,
        "finetune.batch_size": 8,
        "finetune.steps": 2,
        "synthesis.n_images": 8,
        "synthesis.steps": 2,
        "evaluation.epochs": 1,
        "evaluation.batch_size": 4,
        "tracking.enabled": "false",
        "cluster.num_cpus": 2,
    }
    words = [f"--{key}={value}" for key, value in {**small, **options}.items()]
    command = [sys.executable, "-m", "sapf_ray.cli", "run", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((out / "metrics.json").read_text()), "printed": done.stdout}


def test_a_run_of_additions_only(tmp_path, tiny_pipeline):
    metrics = ran(
        tmp_path / "run",
        ["score", "data_set", "metric", "accountant", "classifier"],
        **{
            "model.path": tiny_pipeline,
            "data.source": "stripes",
            "saliency.score": "fisher",
            "privacy.accountant": "prv",
            "evaluation.classifiers": '["logistic"]',
        },
    )
    assert {"f_score", "fid_glyph", "accuracy_logistic"} <= metrics.keys()
    assert "harmonic mean of precision and recall" in metrics["printed"]
    assert 0 < metrics["epsilon_spent"] <= 8
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert selection["score"] == "fisher" and len(selection["scores"]) == 24


def test_a_run_of_an_own_model_with_a_data_free_score(tmp_path, own_model):
    metrics = ran(
        tmp_path / "run",
        ["model_family", "data_free_score", "data_set"],
        **{
            "model.path": own_model,
            "data.source": "stripes",
            "saliency.score": "magnitude",
            "privacy.accountant": "rdp",
            "evaluation.enabled": "false",
        },
    )
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert selection["score"] == "magnitude" and len(selection["matrices"]) == 8
    assert selection["event"] is None and metrics["epsilon_spent"] <= 8
