"""Spaces: every file in tune_spaces parses into distinct valid cells.

What is wrong is one line that names it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sapf_ray.config import flatten, to_dict
from sapf_ray.errors import SapfError
from sapf_ray.tune.space import load_space, make_cells, space_names

SPACES = ("digits", "dp_lora", "person_level", "private_choice", "remedies", "stand_in")
GRIDS = tuple(name for name in space_names() if name not in SPACES)


def write(tmp_path: Path, **keys: object) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return str(path)


def test_one_space_per_table_and_figure():
    assert set(GRIDS) == {f"table{n}" for n in (2, 5, 6, 7, 8, 9, 11, 12, 15)} | {
        f"figure{n}" for n in (4, 5, 6, 7)
    }


@pytest.mark.parametrize("name", space_names())
def test_every_space_makes_distinct_cells(name):
    for smoke in (False, True) if name in GRIDS else (False,):
        cells = make_cells(load_space(name, smoke))
        assert len({cell.name for cell in cells}) == len(cells) > 1


def test_table5_is_models_by_data_sets_by_methods_by_budgets():
    cells = make_cells(load_space("table5"))
    assert len(cells) == 4 * 4 * 7 * 2
    assert all(
        cell.config.finetune.steps == (0 if cell.method in ("pe", "aug-pe") else 1000)
        for cell in cells
    )
    paper = next(cell for cell in cells if cell.labels["method"] == "DP-SAPF")
    assert (
        paper.config.saliency.score == "noisy_mean_gradient"
        and paper.config.saliency.noise_multiplier == 5
    )


def test_order_of_layers_base_then_overrides_then_method_then_axes(tmp_path):
    space = load_space(
        write(
            tmp_path,
            preset="digits",
            base={"finetune.steps": 7, "privacy.epsilon": 3.0, "synthesis.steps": 4},
            axes={"method": ["dp-lora", "public"], "epsilon": [2.0]},
        )
    )
    lora, public = make_cells(space, {"finetune.steps": 9, "synthesis.n_images": 30})
    assert (lora.config.finetune.steps, public.config.finetune.steps) == (9, 0), (
        "a method's row outlasts an override"
    )
    assert lora.config.privacy.epsilon == 2.0 and lora.config.saliency.ratio == 1.0
    assert lora.config.synthesis.n_images == 30 and lora.config.synthesis.steps == 4
    assert lora.config.finetune.batch_size == 512, "from the preset"
    assert (lora.name, lora.labels) == ("dp-lora_epsilon2", {"method": "dp-lora", "epsilon": 2.0})


def test_repeatable_seeds_the_noise_with_the_cells_seed(tmp_path):
    cells = make_cells(load_space(write(tmp_path, repeatable=True, axes={"seed": [0, 5]})))
    assert [cell.config.privacy.reproducible_seed for cell in cells] == [0, 5]
    plain = make_cells(load_space(write(tmp_path, axes={"seed": [0, 5]})))
    assert [cell.config.privacy.reproducible_seed for cell in plain] == [None, None]


def test_yaml_words_become_numbers(tmp_path):
    (cell,) = make_cells(load_space(write(tmp_path, axes={"finetune.learning_rate": ["1e-3"]})))
    assert cell.config.finetune.learning_rate == 1e-3


def test_smoke_block_replaces_axes_and_only_keeps_cells():
    space = load_space("table5", smoke=True)
    cells = make_cells(space, only={"method": "PE", "epsilon": "1.0"})
    assert {cell.labels["model"] for cell in cells} == {"glyphs-tiny", "letters-tiny"} and len(
        cells
    ) == 2
    keys = flatten(to_dict(cells[0].config))
    assert (
        keys["data.source"] == "digits"
        and keys["synthesis.n_images"] == 200
        and keys["evaluation.epochs"] == 10
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"axes": {"method": ["dp-sapf", "nonsense"]}},
            r"cell nonsense: --method = 'nonsense': must be one of dp-sapf",
        ),
        (
            {"axes": {"ratio": [0.3, 0.0]}},
            r"cell ratio0: saliency\.ratio = 0\.0: must lie in \(0, 1\]",
        ),
        (
            {"axes": {"epsilon": ["much"]}},
            r"cell much: privacy\.epsilon = 'much': must be a value of type float",
        ),
        (
            {"axes": {"finetune.stepz": [1]}},
            r"finetune\.stepz = 1: unknown key; allowed: finetune\.steps",
        ),
        ({"axes": {"seed": [1, 1]}}, r"axes\.seed: 1 is there twice"),
        ({"axes": {"seed": 3}}, r"axes\.seed = 3: must be a list"),
        (
            {"axes": {"ratio": [1.0]}, "rows": {"a": {"method": "dp-lora"}, "b": {}}},
            r"cells a_ratio1 and b_ratio1 repeat each other",
        ),
        ({"rows": {"a b": {"seed": 1}, "a-b": {"seed": 2}}}, r"cell a-b: two cells have this name"),
        ({"axis": {}}, r"axis: unknown key; allowed: title"),
        ({"from": "nowhere", "axes": {"seed": [1]}}, r"common/nowhere: no such space"),
        ({"preset": "none", "axes": {"seed": [1]}}, r"--preset none: unknown"),
        ({"axes": {"seed": [1]}, "skip": [{"seed": 1}]}, r"no cells"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, keys, message):
    with pytest.raises(SapfError, match=message) as error:
        make_cells(load_space(write(tmp_path, **keys)))
    assert "\n" not in str(error.value)


def test_overrides_do_not_change_what_an_axis_sets(tmp_path):
    space = load_space(write(tmp_path, axes={"epsilon": [1.0, 2.0]}))
    with pytest.raises(SapfError, match=r"--privacy\.epsilon: is set by the axis 'epsilon'"):
        make_cells(space, {"privacy.epsilon": 3.0})
    with pytest.raises(SapfError, match=r"--only epsilon=7: no such cell of space; 1\.0, 2\.0"):
        make_cells(space, only={"epsilon": "7"})


def test_unknown_space_lists_the_known_ones():
    with pytest.raises(
        SapfError, match=r"table99: no such space; give a YAML file or one of .*table5"
    ):
        load_space("table99")
