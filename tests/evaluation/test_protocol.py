from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.errors import DataError
from sapf_ray.evaluation.inputs import Inputs, resize
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.protocol import evaluate
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import write_manifest, write_shard

CONFIG = EvaluationConfig(epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def source():
    return open_source(DataConfig())


def write_digits(directory, source, names, side):
    """Real digits in the place of synthetic ones, labels 0, 1, 2, … as the plan has them."""
    plan = SamplingPlan(n_images=60, n_classes=10, shard_size=40, seed=0)
    labels = source.labels("train")
    records = np.array([np.flatnonzero(labels == i % 10)[i // 10] for i in range(60)])
    images, _ = source.read("train", records, resolution=side)
    for shard in plan.shards:
        write_shard(
            directory,
            plan,
            shard=shard,
            images=images[shard.start : shard.stop],
            class_names=names,
            prompts=source.prompts,
            spec="spec",
        )
    write_manifest(
        directory,
        plan,
        class_names=names,
        prompts=source.prompts,
        spec="spec",
        privacy_note=PrivacyNote(text=""),
    )


def inputs_of(directory, source, *, resolution, config=CONFIG):
    return Inputs(
        synthetic_dir=str(directory), source=source, resolution=resolution, config=config, seed=0
    )


# 20: images that are resized first, as below
@pytest.mark.parametrize("side", [32, pytest.param(20, marks=pytest.mark.long)])
def test_scores_of_a_data_set_on_disk(source, tmp_path, side):
    write_digits(tmp_path, source, source.class_names, side)
    scores = evaluate(inputs_of(tmp_path, source, resolution=32))
    assert set(scores) == {
        "fid_glyph",
        "accuracy",
        "accuracy_cnn",
        "conditional_fidelity",
        "judge_accuracy",
        "n_synthetic",
        "n_reference",
        "n_test",
    }
    assert (scores["n_synthetic"], scores["n_reference"], scores["n_test"]) == (60, 500, 500)
    assert scores["accuracy"] > 0.2 and scores["fid_glyph"] > 0
    assert min(scores["conditional_fidelity"], scores["judge_accuracy"]) > 0.6, "these are real"


def test_another_list_of_classes_is_refused(source, tmp_path):
    write_digits(tmp_path, source, tuple("abcdefghij"), 32)
    with pytest.raises(DataError, match="a, b, c"):
        evaluate(inputs_of(tmp_path, source, resolution=32))


def test_tasks_on_the_cluster_give_the_same_scores(source, tmp_path, ray_cluster):
    write_digits(tmp_path, source, source.class_names, 16)
    config = EvaluationConfig(
        epochs=1, batch_size=16, classifiers=["cnn", "resnet"], scores=["kid", "precision_recall"]
    )
    expected = evaluate(inputs_of(tmp_path, source, resolution=16, config=config))
    work = tmp_path / "private" / "evaluation"
    scores = evaluate_on_cluster(tmp_path, source, resolution=16, config=config, seed=0, work=work)
    assert scores.keys() == expected.keys() and "recall_glyph" in scores
    assert not work.parent.exists(), "decoded images are gone"
    assert scores == pytest.approx(
        expected, abs=0.02
    )  # threads change rounding, and so a test image or two
    write_digits(tmp_path, source, tuple("abcdefghij"), 16)
    with pytest.raises(DataError, match="a, b, c"):
        evaluate_on_cluster(tmp_path, source, resolution=16, config=config, seed=0)


def test_resize_keeps_what_fits_and_changes_the_rest():
    images = np.full((2, 8, 8, 3), 77, np.uint8)
    assert resize(images, 8) is images
    assert np.array_equal(resize(images, 12), np.full((2, 12, 12, 3), 77, np.uint8))
