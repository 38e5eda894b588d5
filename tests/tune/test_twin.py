"""A public twin has the sensitive set's classes, prompts and sizes, and none of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sapf_ray.config import DataConfig, RunConfig
from sapf_ray.data.base import open_source
from sapf_ray.errors import ConfigError
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import write_shard
from sapf_ray.tune.grid import open_grid
from sapf_ray.tune.summary import privacy_notes
from sapf_ray.tune.twin import is_on_twin, template_of
from tests.tune.test_space import write


@pytest.mark.parametrize(
    ("names", "prompts", "expected"),
    [
        (("cat", "dog"), ("An image of a cat", "An image of a dog"), "An image of a {name}"),
        (("cat", "owl"), ("An image of a cat", "An image of an owl"), None),
        (("0", "1"), ("zero", "one"), None),
    ],
)
def test_a_template_only_where_all_prompts_have_it(names, prompts, expected):
    assert template_of(names, prompts) == expected


def drawn_anew(config: RunConfig, out: str) -> None:
    """In the place of a run: grey images of the source's classes."""
    source = open_source(config.data)
    plan = SamplingPlan(
        n_images=config.synthesis.n_images,
        n_classes=len(source.class_names),
        shard_size=config.synthesis.n_images,
        seed=config.seed,
    )
    (shard,) = plan.shards
    folder = Path(out) / "synthetic"
    folder.mkdir(parents=True)
    write_shard(
        folder,
        plan,
        shard=shard,
        images=np.full((shard.rows, 8, 8, 3), 128, np.uint8),
        class_names=source.class_names,
        prompts=source.prompts,
        spec="spec",
    )


def test_the_cells_of_a_grid_run_on_one_twin(tmp_path):
    made: list[RunConfig] = []

    def make(config: RunConfig, out: str) -> None:
        made.append(config)
        drawn_anew(config, out)

    space = write(
        tmp_path,
        title="",
        base={"privacy.accountant": "rdp", "finetune.batch_size": 64},
        axes={"rate": {"low": {"finetune.learning_rate": 1e-3}, "high": {}}},
    )
    grid = open_grid(space, str(tmp_path / "grid"), make_twin=make)
    (config,) = made
    assert config.finetune.steps == 0 and not config.evaluation.enabled
    assert config.grounding.remedies == "none", "no noise, no vote, no head: nothing sensitive"

    real = open_source(DataConfig())
    for item in grid.planned:
        data = item.cell.config.data
        twin = open_source(data)
        assert is_on_twin(item.cell) and data.source == "parquet"
        assert twin.class_names == real.class_names and twin.prompts == real.prompts
        assert twin.n_train + twin.n_test == real.n_train + real.n_test
        assert twin.n_train == pytest.approx(real.n_train, rel=0.1)
        assert item.plan.epsilon == 10, "the noise is that of the real run"
    (note,) = privacy_notes(grid.planned, grid.out)
    assert "No sensitive image was read" in note


def test_what_is_public_needs_no_twin(tmp_path):
    space = write(tmp_path, title="", base={"data.source": "stand_in"}, axes={"seed": [0]})
    with pytest.raises(ConfigError, match="is public already"):
        open_grid(space, str(tmp_path / "grid"), make_twin=drawn_anew)
