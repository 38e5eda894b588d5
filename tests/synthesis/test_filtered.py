"""Shards whose images a head chose: the same bytes whenever they are made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from sapf_ray.config import ModelConfig
from sapf_ray.models.class_head import ClassHead, Spread
from sapf_ray.models.feature_table import make_features
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis import launcher
from sapf_ray.synthesis.labelling import RELABEL, Labelling
from sapf_ray.synthesis.launcher import synthesize
from sapf_ray.synthesis.recipe import Recipe
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import CARD, is_complete, read_manifest, read_synthetic
from tests.reuse.runs import in_this_process
from tests.synthesis.test_launcher import CONFIG, NAMES, PROMPTS, digests

N = CONFIG.n_images


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return PublicModel.open(ModelConfig(path=str(tiny_pipeline)))


@pytest.fixture(scope="module")
def labelling(model, tmp_path_factory):
    """Three classes by the latents of images: dark, middle and bright ones."""
    features = make_features("latents", model.config)
    rng = np.random.default_rng(0)
    group = np.arange(90) % 3
    images = rng.integers(0, 128, (90, 8, 8, 3)) + 60 * group[:, None, None, None]
    rows = features(images.astype(np.uint8))
    projection = Spread.of(rows, group).projection(4, kind=features.key)
    means = np.stack([projection(rows[group == label]).mean(0) for label in range(3)])
    head = ClassHead(
        projection=projection,
        means=means,
        mean_variance=np.full(means.shape, 0.1),
        variance=1.0,
        shares=np.full(3, 1 / 3),
        reliability=0.9,
    )
    path = tmp_path_factory.mktemp("head") / "head.npz"
    head.save(path)
    return Labelling(head=str(path), features=features, oversample=2.5)


def make(out, model, labelling, config=CONFIG):
    """Runs the synthesis; returns the progress it reported."""
    progress = []
    synthesize(
        out,
        model,
        adapter_dir=None,
        class_names=NAMES,
        prompts=PROMPTS,
        config=config,
        seed=5,
        privacy_note=PrivacyNote(text="epsilon = 1"),
        labelling=labelling,
        on_progress=lambda *step: progress.append(step),
    )
    return progress


@pytest.fixture(scope="module", autouse=True)
def here():
    """Without the actors' processes, which tests/synthesis/test_launcher.py has, and with a head
    tests/grounding/test_head_run.py.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launcher, "_run_queue", in_this_process)
        patched.setattr(launcher, "_actor_count", lambda config: 1)
        yield


@pytest.fixture(scope="module")
def made(here, model, labelling, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    make(out, model, labelling)
    return out


def test_lost_shards_are_redone_to_the_same_bytes(made, model, labelling, tmp_path):
    expected = digests(made)
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert make(tmp_path, model, labelling) == [(22, 22)]  # nothing to do
    lost, _, kept = sorted(tmp_path.glob("*.parquet"))
    lost.unlink()
    written = kept.stat().st_mtime_ns
    assert make(tmp_path, model, labelling) == [(14, 22), (22, 22)]
    assert digests(tmp_path) == expected and kept.stat().st_mtime_ns == written


def test_rows_say_where_image_and_label_come_from(made, labelling):
    images, labels = read_synthetic(made)
    assert images.shape == (N, 8, 8, 3) and labels.tolist() == [i % 3 for i in range(N)]
    plan = SamplingPlan(n_images=N, n_classes=3, shard_size=8, seed=5, oversample=2.5)
    for shard in plan.shards:
        table = pq.read_table(made / shard.file).to_pydict()
        seeds = plan.candidate_seeds(shard).tolist()
        assert len(seeds) == int(np.ceil(2.5 * shard.rows)) and len(set(seeds)) == len(seeds)
        requested = dict(zip(seeds, plan.candidate_labels(shard).tolist(), strict=True))
        for label, prompt, seed, source in zip(
            table["label"], table["prompt"], table["seed"], table["label_source"], strict=True
        ):
            assert prompt == PROMPTS[requested[seed]]
            assert source == ("prompt" if requested[seed] == label else "head")
        assert len(set(table["seed"])) == shard.rows
    assert "private classifier" in (made / CARD).read_text()
    assert read_manifest(made)["class_counts"] == [8, 7, 7]


def test_relabelling_keeps_the_images_and_counts_the_labels(model, labelling, tmp_path):
    rule = dataclasses.replace(labelling, rule=RELABEL, oversample=1.0)
    make(tmp_path / "relabelled", model, rule)
    make(tmp_path / "plain", model, None)
    images, labels = read_synthetic(tmp_path / "relabelled")
    assert np.array_equal(images, read_synthetic(tmp_path / "plain")[0])
    counts = read_manifest(tmp_path / "relabelled")["class_counts"]
    assert counts == np.bincount(labels, minlength=3).tolist()


def test_labels_are_part_of_the_spec(model, labelling, tmp_path):
    def spec(labelling):
        return Recipe.of(
            model,
            None,
            class_names=NAMES,
            prompts=PROMPTS,
            config=CONFIG,
            seed=5,
            labelling=labelling,
        ).spec(N)

    other = tmp_path / "other.npz"
    head = ClassHead.load(labelling.head)
    dataclasses.replace(head, variance=2.0).save(other)
    variants = [
        None,
        labelling,
        dataclasses.replace(labelling, oversample=2.0),
        dataclasses.replace(labelling, rule=RELABEL),
        dataclasses.replace(labelling, head=str(other)),
    ]
    assert len({spec(variant) for variant in variants}) == len(variants)


def test_a_shard_of_foreign_seeds_is_not_complete(made):
    path = sorted(made.glob("*.parquet"))[0]
    spec = pq.ParquetFile(path).schema_arrow.metadata[b"sapf_ray.spec"].decode()
    for seed, whole in ((5, True), (6, False)):
        plan = SamplingPlan(n_images=N, n_classes=3, shard_size=8, seed=seed, oversample=2.5)
        assert is_complete(made, plan, shard=plan.shards[0], spec=spec) == whole


def test_candidates_begin_with_the_planned_images_and_do_not_depend_on_their_number():
    few = SamplingPlan(n_images=20, n_classes=3, shard_size=8, seed=5, oversample=1.5)
    many = dataclasses.replace(few, n_images=200, oversample=2.0)
    for one, other in zip(few.shards[:2], many.shards[:2], strict=True):
        assert few.candidate_seeds(one).tolist() == many.candidate_seeds(other).tolist()[:12]
        assert few.candidate_seeds(one)[:8].tolist() == few.seeds(one).tolist()
        assert few.candidate_labels(one)[:8].tolist() == few.labels(one).tolist()
