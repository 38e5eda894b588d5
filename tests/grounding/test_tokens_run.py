"""A whole run whose classes get learned tokens, from the ledger to the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapf_ray.config import from_dict, nest
from sapf_ray.models.class_tokens import CLASS_TOKENS
from sapf_ray.models.conditioning import encode_conditions
from sapf_ray.models.loading import load_pipeline
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.synthesis.writer import read_synthetic


@pytest.mark.long
def test_a_run_with_class_tokens(ray_cluster, tiny_pipeline, tmp_path):
    flat = {
        "model.path": str(tiny_pipeline),
        "privacy.accountant": "rdp",
        "grounding.remedies": "tokens",
        "grounding.token_weight": 2.0,
        "finetune.batch_size": 16,
        "finetune.steps": 2,
        "synthesis.n_images": 20,
        "synthesis.steps": 2,
        "evaluation.epochs": 1,
        "evaluation.judge_epochs": 1,
        "tracking.enabled": False,
    }
    result = run(from_dict(nest(flat)), str(tmp_path / "run"))
    directory = result.directory
    saved = load_file(directory.adapter / CLASS_TOKENS)
    prompts = [f"An image of the digit {n}" for n in ["zero", "one", "two"]]
    public = encode_conditions(load_pipeline(str(tiny_pipeline)), prompts).states
    assert saved["offsets"].shape == (10, *public.shape[1:])
    assert (saved["offsets"].flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(saved["prompt_embeds"][:3], public + saved["offsets"][:3])
    stages = [event.stage for event in Ledger.open(directory.ledger).events()]
    assert stages == ["selection", "finetune", "finetune"], "tokens have no release of their own"
    assert "Class tokens were trained in fine-tuning's own releases" in directory.card.read_text()
    images, labels = read_synthetic(directory.synthetic)
    assert len(images) == 20 and np.bincount(labels).tolist() == [2] * 10
    assert {"accuracy", "conditional_fidelity", "judge_accuracy"} <= result.metrics.keys()
