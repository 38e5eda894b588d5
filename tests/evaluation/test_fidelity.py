from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.errors import DataError
from sapf_ray.evaluation import fidelity
from sapf_ray.evaluation.metrics import requested
from sapf_ray.evaluation.pictures import InMemory
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.models.inception import INCEPTION_WEIGHTS

CONFIG = EvaluationConfig()


def pictures(images):
    return InMemory(pixels=images, labels=np.zeros(len(images), np.int64))


def frechet(images, reference, **options):
    return fidelity.frechet(pictures(images), pictures(reference), **options)


@pytest.fixture(scope="module")
def digits():
    return open_source(DataConfig()).read("train", np.arange(400), resolution=32)[0]


def test_identical_sets_have_distance_zero(digits):
    assert 0 <= frechet(digits, digits, config=CONFIG) < 1e-3


def test_noise_is_farther_than_other_digits(digits):
    noise = np.random.default_rng(0).integers(0, 256, digits.shape, dtype=np.uint8)
    same = frechet(digits[:200], digits[200:], config=CONFIG)
    assert 0 < 5 * same < frechet(noise, digits, config=CONFIG)


def test_fewer_images_than_features_and_any_size(digits):
    large = np.repeat(np.repeat(digits[:6], 3, axis=1), 3, axis=2)
    assert np.isfinite(frechet(large, digits[:5], config=CONFIG))
    with pytest.raises(DataError, match="at least 2"):
        frechet(digits[:1], digits, config=CONFIG)


def test_nothing_is_written_for_glyph_features(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = EvaluationConfig(cache_dir=str(tmp_path / "cache"))
    frechet(digits[:20], digits[20:40], config=config)
    assert not list(tmp_path.rglob("*"))


class TestInceptionWeights:
    def refused(self, path):
        config = EvaluationConfig(inception_weights=str(path))
        with pytest.raises(DataError, match=INCEPTION_WEIGHTS) as caught:
            check_evaluation(config)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        check_evaluation(EvaluationConfig(enabled=False, inception_weights=str(path)))
        return str(caught.value)

    def test_missing(self, tmp_path):
        assert "no such file" in self.refused(tmp_path / "inception.pth")

    def test_truncated(self, tmp_path):
        path = tmp_path / "inception.pth"
        torch.save({"Mixed_7c.branch1x1.conv.weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
        assert "truncated" in self.refused(path)

    def test_of_another_network(self, tmp_path):
        path = tmp_path / "inception.pth"
        torch.save({"weight": torch.zeros(3)}, path)
        assert "another network" in self.refused(path)

    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        torch.save(Evil(), tmp_path / "inception.pth")
        self.refused(tmp_path / "inception.pth")
        assert not (tmp_path / "owned").exists()

    def test_glyph_features_need_none(self):
        check_evaluation(EvaluationConfig(fid_features="glyph", inception_weights="nowhere.pth"))


def test_other_numbers_of_torch_fidelity_by_its_keywords(digits):
    found = fidelity.compare(
        pictures(digits[:50]), pictures(digits[50:]), config=CONFIG, kid=True, kid_subset_size=20
    )
    assert np.isfinite(found["kernel_inception_distance_mean"])


@pytest.mark.long
def test_inception_features_are_named_fid_and_cached_where_asked(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # random weights: only the way they are used is tested, not the number
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}
    )
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    weights = tmp_path / "inception.pth"
    torch.save(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), weights)
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = EvaluationConfig(inception_weights=str(weights), cache_dir=str(tmp_path / "cache"))
    assert "fid" in requested(config) and "fid_glyph" not in requested(config)
    first = frechet(digits[:4], digits[4:8], config=config)
    assert np.isfinite(first)
    cached = sorted((tmp_path / "cache").iterdir())
    assert cached and (tmp_path / "cache").stat().st_mode & 0o077 == 0
    assert frechet(digits[:4], digits[4:8], config=config) == first
    assert sorted((tmp_path / "cache").iterdir()) == cached and not (tmp_path / "torch").exists()
