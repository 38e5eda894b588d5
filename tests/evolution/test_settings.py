from __future__ import annotations

import pytest

from sapf_ray.config import EvolutionConfig, from_dict, result_keys
from sapf_ray.errors import ConfigError
from tests.evolution.toy import AUG_PE, PE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("iterations", True),
        ("population", 0),
        ("variations", 0),
        ("lookahead", -1),
        ("enabled", 1),
        ("selection", "best"),
        ("threshold", -0.1),
        ("threshold", float("inf")),
        ("strength_start", 0.0),
        ("strength_start", 1.1),
        ("strength_end", 0.95),
        ("embedding", "clip"),
        ("embedding", "inception"),
        ("cpus_per_task", 0),
        ("gpus_per_task", -1),
        ("keep_selected", "yes"),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError) as caught:
        from_dict({"evolution": {field: value}})
    name = "evolution.inception_weights" if value == "inception" else f"evolution.{field}"
    assert str(caught.value).startswith(f"{name} = ") and "\n" not in str(caught.value)


def test_an_evolution_beside_fine_tuning_is_refused():
    with pytest.raises(
        ConfigError, match=r"finetune\.steps = 5: must be 0 where evolution\.enabled is true"
    ):
        from_dict({"evolution": {"enabled": True}, "finetune": {"steps": 5}})


def test_resources_may_differ_between_two_starts():
    one, other = (
        {"evolution": {"cpus_per_task": cpus, "gpus_per_task": cpus}} for cpus in (1.0, 2.0)
    )
    assert result_keys(from_dict(one)) == result_keys(from_dict(other))


def test_strength_falls_linearly_from_start_to_end():
    config = EvolutionConfig(iterations=4, strength_start=0.9, strength_end=0.3)
    assert [config.strength(i) for i in range(4)] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert EvolutionConfig(iterations=1).strength(0) == 0.9


def test_pe_and_aug_pe_are_rows():
    pe, aug = EvolutionConfig(**PE), EvolutionConfig(**AUG_PE)
    assert (pe.candidates, aug.candidates) == (pe.population, 4 * aug.population)
