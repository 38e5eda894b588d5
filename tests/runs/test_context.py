"""The context of a run: what is opened when, and what the driver never does."""

from __future__ import annotations

import json

import pytest
from diffusers import DiffusionPipeline

from sapf_ray.config import from_dict
from sapf_ray.data.base import open_source
from sapf_ray.errors import RunDirectoryError
from sapf_ray.models.public_model import PublicModel
from sapf_ray.pipeline import LEARN, RELEASE, run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.runs.context import open_run
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.stages import Stage


def small(model, **changes) -> dict:
    """A run of seconds on real digits."""
    return {
        "model.path": str(model),
        "privacy.epsilon": 8.0,
        "privacy.accountant": "rdp",
        "finetune.batch_size": 16,
        "finetune.steps": 2,
        "synthesis.n_images": 10,
        "synthesis.steps": 2,
        "evaluation.enabled": False,
        "tracking.enabled": False,
        **changes,
    }


def nested(flat: dict) -> dict:
    sections: dict = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


@pytest.mark.parametrize(
    ("score", "adapter"),
    [
        # a second whole run: tests/grounding/test_stage.py sees the same of its own
        pytest.param("per_sample_norm", "lora", marks=pytest.mark.long),
        pytest.param("synflow", "direct", marks=pytest.mark.long),
    ],
)
def test_the_driver_loads_no_weights(
    ray_cluster, tiny_pipeline, tmp_path, monkeypatch, score, adapter
):
    """The workers do; theirs are processes of their own, which the patch does not reach."""

    def refuse(*arguments, **options):
        raise AssertionError("the driver loads weights")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    changes = {"saliency.score": score, "finetune.adapter": adapter}
    result = run(from_dict(nested(small(tiny_pipeline, **changes))), str(tmp_path / "run"))
    assert result.directory.adapter.exists()
    releases = [event.stage for event in Ledger.open(result.directory.ledger).events()]
    assert releases.count(Stage.FINETUNE) == 2


def test_a_run_of_the_earlier_version_is_refused_in_one_line(tiny_pipeline, tmp_path):
    config = from_dict(nested(small(tiny_pipeline)))
    source = open_source(config.data)
    plan = make_plan(config, source.n_train)
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config)
    directory.release()
    header = json.dumps({"schema": 1, "plan": plan.to_dict()})
    directory.ledger.write_text(header + "\n")
    with pytest.raises(RunDirectoryError, match=r"earlier version .* stay readable") as caught:
        with open_run(
            config,
            str(directory.root),
            source=source,
            model=PublicModel.open(config.model),
            plan=plan,
            on_progress=None,
            since=0.0,
        ) as context:
            _ = context.ledger
    assert "\n" not in str(caught.value) and directory.ledger.read_text() == header + "\n"


def test_the_stages_are_the_papers_and_none_twice():
    stages = [step.stage for step in (*LEARN, *RELEASE)]
    of_grounding = {Stage.VOTE, Stage.HEAD, Stage.PROPORTIONS}  # releases in it
    assert set(stages) | {Stage.PLAN} | of_grounding == set(Stage)
    assert len(set(stages)) == len(stages)
    order = [Stage.LATENTS, Stage.SELECTION, Stage.FINETUNE, Stage.SYNTHESIS, Stage.EVALUATION]
    assert [stage for stage in stages if stage in order] == order
