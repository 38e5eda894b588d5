"""The table of metrics: what is computed, kept, shown, and what may be read for it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.inputs import REFERENCE, SYNTHETIC, TEST, TRAIN, Inputs
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import (
    METRICS,
    Metric,
    from_real_images,
    headline,
    known_scores,
    requested,
    shown,
)
from sapf_ray.evaluation.protocol import evaluate
from sapf_ray.evaluation.set_scores import SET_METRICS
from sapf_ray.tune.summary import score_columns

from .test_protocol import write_digits

CONFIG = EvaluationConfig(epochs=1, batch_size=16)


@pytest.fixture
def inputs(tmp_path):
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    return Inputs(synthetic_dir=str(tmp_path), source=source, resolution=16, config=CONFIG, seed=0)


@pytest.fixture
def brightness():
    """A metric of the synthetic images alone, added from outside."""
    METRICS["brightness"] = Metric(
        title="mean pixel",
        higher_is_better=None,
        reads=(SYNTHETIC,),
        compute=lambda inputs: float(np.mean([b.mean() for b in inputs.synthetic.batches()])),
    )
    yield
    del METRICS["brightness"]


def test_the_settings_choose_the_rows():
    assert "fid_glyph" in requested(CONFIG) and "fid" not in requested(CONFIG)
    both = EvaluationConfig(classifiers=["cnn", "wrn"])
    assert list(requested(both))[:2] == ["accuracy_cnn", "accuracy_wrn"]
    with pytest.raises(
        ConfigError, match=r"metric = 'nothing': must be one of accuracy, conditional_fidelity,"
    ):
        METRICS["nothing"]


def test_a_metric_reads_only_what_its_row_declares(inputs):
    restricted = inputs.restricted_to([SYNTHETIC])
    assert (len(restricted.synthetic), restricted.synthetic.side) == (60, 16)
    for what in ("test", "train", "reference"):
        with pytest.raises(ValueError, match="does not declare"):
            getattr(restricted, what)
    METRICS["liar"] = Metric(
        title="reads the training images and says it does not",
        higher_is_better=None,
        reads=(SYNTHETIC,),
        compute=lambda inputs: len(inputs.train),
    )
    try:
        with pytest.raises(ValueError, match="real training images"):
            evaluate(inputs)
    finally:
        del METRICS["liar"]


def test_reference_images_are_those_that_the_settings_name(inputs):
    assert len(inputs.reference) == inputs.n_reference == 500
    config = EvaluationConfig(fid_reference="train")
    train = Inputs(
        synthetic_dir=inputs.synthetic_dir,
        source=inputs.source,
        resolution=16,
        config=config,
        seed=0,
    )
    assert train.reference is train.train and train.n_reference == 1297


def test_images_that_were_read_are_shared_here_and_do_not_travel(inputs):
    read = inputs.restricted_to([TEST]).test
    assert inputs.test is read
    assert len(pickle.dumps(inputs)) < 20_000
    there = pickle.loads(pickle.dumps(inputs))
    rows = np.array([7, 3])
    assert np.array_equal(there.test.read(rows), read.read(rows)) and there.config == inputs.config


def test_a_second_start_computes_only_what_is_missing(inputs, ray_cluster, brightness):
    def start(known):
        return evaluate_on_cluster(
            inputs.synthetic_dir,
            inputs.source,
            resolution=16,
            config=CONFIG,
            seed=0,
            known=known,
        )

    first = start({})
    assert first["accuracy"] == first["accuracy_cnn"]
    assert {"n_synthetic", "n_reference", "n_test", "brightness"} <= set(first)
    saved = {**first, "fid_glyph": -1.0, "synthesis_idle_share": 0.25, "epsilon_spent": 1.0}
    kept = known_scores(saved)
    assert kept.keys() == {*first, "synthesis_idle_share"}, "n_* must not vanish"
    assert start(kept) == kept, "a marked score is not computed again"
    del kept["brightness"], kept["n_test"]
    assert start(kept) == known_scores(saved)


def test_what_comes_from_real_images_is_known():
    names = ["accuracy", "accuracy_cnn", "fid", "n_test", "synthesis_idle_share", "epsilon_spent"]
    assert from_real_images(names) == ["accuracy", "accuracy_cnn", "fid"]
    assert all(REFERENCE in METRICS[name].reads for name in ("fid", "fid_glyph"))
    of_train = [name for name, metric in METRICS.items() if TRAIN in metric.reads]
    assert of_train == ["conditional_fidelity", "judge_accuracy"] == from_real_images(of_train)


def test_scores_are_shown_as_the_row_says(brightness):
    assert (shown("accuracy", 0.7512), shown("fid_glyph", 4.034)) == ("75.1%", "4.03")
    assert list(headline()) == [
        "accuracy",
        "conditional_fidelity",
        *SET_METRICS,
        "brightness",
    ]
    rows = [{"accuracy": 75.1, "brightness": 3.0}]
    assert [c.key for c in score_columns(rows)] == ["accuracy", "brightness"]
    assert [c.paper_key for c in score_columns(rows, paper=True)] == [
        "paper_acc",
        "paper_fid",
        None,
    ]
