"""At which size images are compared, and who says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.data.catalog import DATA_SETS
from sapf_ray.data.medmnist_sets import MEDMNIST
from sapf_ray.data.whole import WholeSource
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.inputs import Inputs, resize
from sapf_ray.evaluation.protocol import check_evaluation
from tests.data.sources.made import SOURCES
from tests.evaluation.test_protocol import write_digits

CONFIG = EvaluationConfig()
OWN = {"image_folder", "parquet", "webdataset", "arrow", "npz"}
NAMES = sorted({key.partition("/")[0] for key in SOURCES})


@pytest.mark.parametrize("name", NAMES)
def test_every_source_knows_its_size_or_is_told(name, tmp_path):
    config = DataConfig(source=name, path=str(SOURCES[name].build(tmp_path, "right")))
    side = open_source(config).resolution
    if name in OWN:
        assert side is None
        assert open_source(dataclasses.replace(config, resolution=96)).resolution == 96
        return
    # a MedMNIST file has the size that it has, whatever its name
    assert side == (28 if name in MEDMNIST else DATA_SETS[name].resolution)
    with pytest.raises(ConfigError, match=r"data\.resolution = 96: is not for .* evaluation\.res"):
        open_source(dataclasses.replace(config, resolution=96))


def test_digits_are_compared_as_ever_and_a_whole_set_keeps_its_size():
    source = open_source(DataConfig())
    assert WholeSource(source).resolution == source.resolution == 32


@pytest.mark.parametrize(
    ("asked", "native", "made", "expected"),
    [(None, 32, 512, 32), (None, None, 256, 256), (None, 512, 256, 256), (64, 32, 256, 64)],
)
def test_the_smaller_side_counts_unless_one_is_asked_for(asked, native, made, expected):
    config = EvaluationConfig(resolution=asked)
    check_evaluation(config, made=made)
    assert config.compared_at(native, made) == expected


def test_a_size_above_that_of_the_synthetic_images_is_refused():
    config = EvaluationConfig(resolution=257)
    with pytest.raises(ConfigError, match=r"evaluation\.resolution = 257: must be at most 256"):
        check_evaluation(config, made=256)
    check_evaluation(config)
    check_evaluation(dataclasses.replace(config, enabled=False), made=256)


def test_synthetic_images_are_reduced_without_aliases(tmp_path):
    """Stripes of one pixel become grey; picking every other pixel leaves them black or white."""
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    inputs = Inputs(synthetic_dir=str(tmp_path), source=source, resolution=8, config=CONFIG, seed=0)
    assert inputs.synthetic.read(np.arange(60)).shape == (60, 8, 8, 3)
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    reduced = resize(stripes, 16).astype(int)
    assert abs(reduced - 128).max() < 16
    assert abs(stripes[:, ::4, ::4].astype(int) - 128).min() > 100, "the twin that aliases"
