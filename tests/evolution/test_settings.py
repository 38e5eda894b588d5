from __future__ import annotations

import pytest

from sapf_ray.errors import ConfigError
from sapf_ray.evolution import AUG_PE, PE, EvolutionConfig


@pytest.mark.parametrize(("field", "value"), [
    ("iterations", -1), ("iterations", True), ("n_images", 0), ("population", 0), ("variations", 0), ("lookahead", -1),
    ("selection", "best"), ("threshold", -0.1), ("threshold", float("inf")), ("strength_start", 0.0),
    ("strength_start", 1.1), ("strength_end", 0.95), ("embedding", "clip"), ("embedding", "inception"), ("steps", 0),
    ("guidance_scale", 0.5), ("batch_size", 0), ("shard_size", 0), ("cpus_per_task", 0), ("gpus_per_task", -1),
    ("keep_selected", "yes"),
])
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError) as caught:
        EvolutionConfig(**{field: value})
    name = "evolution.inception_weights" if value == "inception" else f"evolution.{field}"
    assert str(caught.value).startswith(f"{name} = ") and "\n" not in str(caught.value)


def test_strength_falls_linearly_from_start_to_end():
    config = EvolutionConfig(iterations=4, strength_start=0.9, strength_end=0.3)
    assert [config.strength(i) for i in range(4)] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert EvolutionConfig(iterations=1).strength(0) == 0.9


def test_pe_and_aug_pe_are_rows():
    pe, aug = EvolutionConfig(**PE), EvolutionConfig(**AUG_PE)
    assert (pe.candidates, aug.candidates) == (pe.population, 4 * aug.population)
