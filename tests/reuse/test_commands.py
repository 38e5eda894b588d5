"""What is made from a finished run later: paid for once, told from where it is, no image read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sapf_ray
from sapf_ray import afterwards
from sapf_ray.config import flatten, from_dict, nest, to_dict
from sapf_ray.data.base import open_source
from sapf_ray.data.whole import WholeSource
from sapf_ray.errors import ConfigError, DataError, RunDirectoryError
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.protocol import evaluate as evaluate_here
from sapf_ray.pipeline import run
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.verdict import Kind
from sapf_ray.reuse.commands import asks_for_more, evaluate, make_more, synthesize
from sapf_ray.runs.tracking import Tracker
from sapf_ray.synthesis.writer import read_manifest, read_synthetic
from tests.commands import call
from tests.reuse.runs import (
    config_of,
    digests,
    finished_run,
    make_images,
    snapshot,
    without_ray,
)


@pytest.fixture(scope="module", autouse=True)
def no_cluster():
    with pytest.MonkeyPatch.context() as patched:
        without_ray(patched)
        yield


@pytest.fixture(scope="module")
def original(no_cluster, tiny_pipeline, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "cells"
    return finished_run(root, config_of(tiny_pipeline)).root


@pytest.fixture
def finished(original, tmp_path) -> Path:
    """Another place than where it was made, and its images are nowhere."""
    return shutil.copytree(original, tmp_path / "moved")


def with_changes(config, **changes):
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return from_dict(nest(flatten(to_dict(config)) | flat))


def test_more_images_are_those_of_a_larger_run_and_nothing_is_spent(
    finished, tiny_pipeline, tmp_path
):
    before = snapshot(finished)
    progress = []
    result = synthesize(
        finished,
        {"synthesis.n_images": 45},
        on_progress=lambda stage, done, total: progress.append((stage, done, total)),
    )
    home = finished / "synthesis" / "n_images-45"
    assert result.directory.home == home
    first = with_changes(config_of(tiny_pipeline), synthesis__n_images=45)
    steps = make_images(tmp_path / "first", sapf_ray_directory(finished), first)
    assert digests(home / "synthetic") == digests(tmp_path / "first")
    progress = [step for step in progress if step[2]]  # a stage that begins has no total yet
    assert steps[0] == (0, 45) and progress[0] == ("synthesis", 20, 45), "20 were copied"
    after = snapshot(finished)
    new = {name for name in after if name not in before}
    assert {name: after[name] for name in before} == before, "ledger and all else as they were"
    assert all(name.startswith("synthesis/n_images-45/") for name in new)
    assert result.metrics["epsilon_spent"] == Ledger.open(finished / "ledger.jsonl").epsilon_spent()
    assert (home / "plots" / "synthetic.png").exists()


def sapf_ray_directory(root: Path):
    from sapf_ray.runs.directory import RunDirectory

    return RunDirectory(root)


def test_cards_name_run_epsilon_and_claim(finished):
    result = synthesize(finished, {"synthesis": {"guidance_scale": 3.0, "seed": 7}}, name="other")
    home = result.directory.home
    epsilon = f"{result.metrics['epsilon_spent']:.4g}"
    own, of_images = (home / "README.md").read_text(), (home / "synthetic/README.md").read_text()
    for card in (own, of_images):
        assert "`moved`" in card and f"ε = {epsilon} at δ" in card and "post-processing" in card
    assert "| `synthesis.guidance_scale` | 2.0 | 3.0 |" in own
    assert "`synthesis.seed: 7`" in of_images and result.verdict.kind is Kind.PRIVATE
    theirs, ours = read_synthetic(finished / "synthetic"), read_synthetic(home / "synthetic")
    assert (theirs[0] != ours[0]).any() and np.array_equal(theirs[1], ours[1])


def test_asked_twice_nothing_is_made_again_and_one_grows_from_another(finished):
    synthesize(finished, {"synthesis.n_images": 40})
    shards = snapshot(finished / "synthesis")
    synthesize(finished, {"synthesis.n_images": 40})
    again = snapshot(finished / "synthesis")
    for name in (name for name in shards if "train-" in name):
        assert again[name] == shards[name]
    shutil.rmtree(finished / "synthetic")
    progress = []
    synthesize(
        finished / "synthesis" / "n_images-40",
        {"synthesis.n_images": 55},
        on_progress=lambda *step: progress.append(step),
    )
    assert next(step for step in progress if step[2]) == ("synthesis", 40, 55)
    with pytest.raises(RunDirectoryError, match=r"holds a result with synthesis\.n_images = 40"):
        synthesize(finished, {"synthesis.n_images": 30}, name="n_images-40")


def test_classes_in_given_proportions_and_another_resolution(finished):
    result = synthesize(
        finished,
        {
            "synthesis.n_images": 24,
            "synthesis.class_proportions": [3, 1],
            "synthesis.resolution": 16,
        },
    )
    assert result.directory.home.name == "n_images-24-class_proportions-3+1-resolution-16"
    images, labels = read_synthetic(result.directory.synthetic)
    assert images.shape == (24, 16, 16, 3) and np.bincount(labels).tolist() == [18, 6]
    assert read_manifest(result.directory.synthetic)["class_counts"] == [18, 6]
    card = (result.directory.synthetic / "README.md").read_text()
    assert "gave as public knowledge (3, 1)" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"synthesis.class_proportions": [3, 1, 1]}, "must be 2 weights, one for each class"),
        ({"synthesis.class_proportions": [0, 0]}, "must hold a weight above 0"),
        ({"synthesis.resolution": 9}, "must be a multiple of 2; the model was made for 8"),
        ({"privacy.epsilon": 3.0}, "cannot be changed when a run is over"),
        ({"finetune": {"steps": 9}}, "finetune.steps = 9: cannot be changed when a run is over"),
        ({"evaluation.epochs": 3}, "takes keys of model, synthesis, tracking, cluster, plugins"),
        ({}, "nothing is changed"),
    ],
)
def test_what_cannot_be_made_is_one_line(finished, changes, words):
    before = snapshot(finished)
    with pytest.raises(ConfigError, match=words) as caught:
        synthesize(finished, changes)
    assert "\n" not in str(caught.value) and snapshot(finished) == before


def test_a_changed_model_is_refused(finished, tiny_pipeline, tmp_path):
    other = shutil.copytree(tiny_pipeline, tmp_path / "model")
    same = synthesize(finished, {"synthesis.seed": 3, "model.path": str(other)})
    assert same.directory.home.name == "seed-3"
    settings = other / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("0.012", "0.013"))
    with pytest.raises(DataError, match=r"not those that .* was made with"):
        synthesize(finished, {"synthesis.seed": 4, "model.path": str(other)})


@pytest.mark.parametrize(
    ("changes", "verdict", "of_images"),
    [
        ({"privacy__reproducible_seed": 5}, "NOT FOR RELEASE", "**NOT FOR RELEASE.**"),
        ({"method": "dp-sapf-no-dp"}, "NOT PRIVATE", "**NOT PRIVATE.**"),
        ({"finetune__steps": 0}, "No sensitive image was used", "**No sensitive image was used:**"),
    ],
)
def test_what_a_result_may_be_called(tiny_pipeline, tmp_path, changes, verdict, of_images):
    if "method" in changes:
        changes = sapf_ray.find_method(changes["method"]).overrides
    directory = finished_run(tmp_path / "run", config_of(tiny_pipeline, **changes))
    notes = []
    result = synthesize(
        directory.root, {"synthesis.n_images": 25}, on_note=lambda line, _: notes.append(line)
    )
    assert notes == [result.verdict.plain] and notes[0].startswith(verdict)
    assert verdict in (result.directory.home / "README.md").read_text()
    of_data_set = (result.directory.synthetic / "README.md").read_text()
    assert of_images in of_data_set and "\n- differential-privacy\n" not in of_data_set


def test_an_unfinished_run_and_an_evolution_are_refused(finished, tiny_pipeline, tmp_path):
    (finished / "privacy_card.md").unlink()
    for command in (synthesize, evaluate):
        with pytest.raises(RunDirectoryError, match="not finished, so what it made has no ε yet"):
            command(finished, {"plugins": []})
    with pytest.raises(RunDirectoryError, match=r"no config\.yaml there"):
        synthesize(tmp_path / "nowhere")
    evolved = config_of(tiny_pipeline, evolution__enabled=True, finetune__steps=0)
    directory = finished_run(tmp_path / "evolved", evolved)
    with pytest.raises(RunDirectoryError, match="evolved by votes"):
        synthesize(directory.root, {"synthesis.n_images": 40})


def test_run_makes_what_only_counts_after_the_last_release_and_refuses_the_rest(
    finished, tiny_pipeline
):
    config = config_of(tiny_pipeline)
    more = with_changes(config, synthesis__n_images=30)
    assert asks_for_more(more, str(finished))
    result = make_more(more, str(finished))
    assert result.directory.home == finished / "synthesis" / "n_images-30"
    assert len(read_synthetic(result.directory.synthetic)[0]) == 30
    both = with_changes(config, synthesis__n_images=30, finetune__steps=5)
    assert not asks_for_more(both, str(finished))
    with pytest.raises((RunDirectoryError, DataError)):  # its images are nowhere
        run(both, str(finished))
    with pytest.raises(RunDirectoryError, match=r"finetune.steps = 4, requested is 5"):
        sapf_ray_directory(finished).check_same(both)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real images of both classes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("bright_cell", "dark_cell")):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                file = root / split / name / f"{i}.png"
                pixels = generator.integers(0, 100, (8, 8, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


@pytest.fixture
def scored_here(monkeypatch):
    """Scores in this process, whose libraries are loaded."""

    def score(synthetic, source, *, resolution, config, seed, known=None, work=None):
        return evaluate_here(
            Inputs(
                synthetic_dir=str(synthetic),
                source=source,
                resolution=resolution,
                config=config,
                seed=seed,
            )
        )

    monkeypatch.setattr(afterwards, "evaluate_on_cluster", score)
    monkeypatch.setattr("sapf_ray.reuse.images.evaluate_on_cluster", score)


def test_scores_of_a_run_that_had_none(finished, photos, scored_here, tmp_path):
    before = snapshot(finished)
    result = evaluate(finished, {"data.path": str(photos)}, name="cnn")
    scores = {"accuracy", "accuracy_cnn", "conditional_fidelity", "fid_glyph", "n_test"}
    assert scores <= result.metrics.keys()
    assert result.metrics["n_test"] == 12 and result.metrics["n_synthetic"] == 20
    card = (finished / "evaluation" / "cnn" / "README.md").read_text()
    assert "accuracy on real test images" in card and "not to be released" in card
    after = snapshot(finished)
    assert {name: after[name] for name in before} == before
    torn = tmp_path / "torn"
    shutil.copytree(photos, torn)
    for file in (torn / "train").rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="train"):  # the judge would learn from them
        evaluate(finished, {"data.path": str(torn)})


def test_scores_of_a_later_synthesis(finished, photos, scored_here, capsys):
    synthesize(finished, {"synthesis.n_images": 24}, name="more")
    code, out, err = call(
        capsys,
        "evaluate",
        str(finished / "synthesis" / "more"),
        "--data.path",
        str(photos),
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["n_synthetic"] == 24
    (home,) = (finished / "evaluation").iterdir()
    assert home.name.startswith("more-path-")


def test_commands_print_the_verdict_and_refuse_in_one_line(finished, capsys):
    code, out, err = call(capsys, "synthesize", str(finished), "--synthesis.n_images", "22")
    assert code == 0, err
    assert "Differentially private: ε" in out and "made from the finished run" in out
    code, _, err = call(capsys, "synthesize", str(finished), "--privacy.epsilon", "3")
    assert code == 2 and "privacy.epsilon = '3': cannot be changed when a run is over" in err
    code, _, err = call(capsys, "synthesize", str(finished), "--synthesis.step", "3")
    assert code == 2 and "did you mean synthesis.steps" in err and err.count("\n") == 1


def test_any_parquet_file_is_scored_without_a_run(finished, photos, scored_here, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for label in (1, 0) * 12:
        file = photos / "test" / ("bright_cell", "dark_cell")[label] / f"{len(rows) % 6}.png"
        rows.append({"image": file.read_bytes(), "label": label})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    options = ("--data.source", "image_folder", "--data.path", str(photos))
    words = ("evaluate", str(tmp_path / "images.parquet"), "--evaluation.epochs", "1")
    code, out, err = call(capsys, *words, *options, "--json")
    assert code == 0, err
    scores = json.loads(out)
    assert scores["n_synthetic"] == 24 and 0 <= scores["accuracy"] <= 1
    code, out, _ = call(capsys, *words, *options)
    assert code == 0 and "nothing can be said of their ε" in out and "accuracy" in out
    code, _, err = call(capsys, *words)
    assert code == 2 and "data.source" in err and err.count("\n") == 1


def test_a_test_set_of_its_own_counts_as_a_whole(finished, photos, scored_here):
    changes = {"data.path": str(photos / "test"), "evaluation.test_images": "all"}
    assert evaluate(finished, changes, name="all").metrics["n_test"] == 12
    split = evaluate(finished, {"data.path": str(photos / "test")}, name="split")
    assert split.metrics["n_test"] < 12
    with pytest.raises(ConfigError, match="must be split on the run's own data"):
        evaluate(finished, {"evaluation.test_images": "all"})


def test_a_whole_source_has_the_images_of_both_splits_in_order():
    source = open_source(from_dict({"data": {"source": "digits"}}).data)
    whole = WholeSource(source)
    rows = np.array([1296, 1297, 0, 1796])
    images, labels = whole.read("test", rows, resolution=8)
    train, of_train = source.read("train", np.array([1296, 0]), resolution=8)
    test, of_test = source.read("test", np.array([0, 499]), resolution=8)
    assert np.array_equal(images, np.stack([train[0], test[0], train[1], test[1]]))
    assert labels.tolist() == [of_train[0], of_test[0], of_train[1], of_test[1]]
    assert np.array_equal(whole.labels("test")[rows], labels)
    with pytest.raises(ConfigError, match="leaves no training images"):
        whole.labels("train")


class Client:
    """Keeps what is logged to MLflow."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.metrics: dict[str, float] = {}
        self.files: list[str] = []
        self.ended = False

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.tags[key] = value

    def log_metric(self, run_id: str, key: str, value: float) -> None:
        self.metrics[key] = value

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self.files.append(Path(path).name)

    def set_terminated(self, run_id: str) -> None:
        self.ended = True


def test_a_result_is_a_child_of_the_runs_entry_in_mlflow(finished, monkeypatch):
    (finished / "mlflow_run.json").write_text(json.dumps({"run_id": "abc", "uri": "sqlite:///x"}))
    client, parents = Client(), []

    def open_tracker(config, directory):
        parents.append(config.tracking.parent_run_id)
        tracker = Tracker("sqlite:///x", "child")
        tracker.client = client
        return tracker

    monkeypatch.setattr(Tracker, "open", open_tracker)
    result = synthesize(finished, {"synthesis.n_images": 22})
    assert parents == ["abc"] and result.tracking_uri == "sqlite:///x"
    assert client.metrics["epsilon_spent"] == result.metrics["epsilon_spent"]
    assert client.tags["sapf.result_of"] == "moved" and client.ended
    assert client.files == ["config.yaml", "metrics.json", "README.md", "synthetic.png"]
