"""Whatever can be added from outside the package is added here, by one file each, and used.

The files stand in ``tests/plugins``; CONTRIBUTING.md points at them as its recipes.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sapf_ray import registry
from sapf_ray.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    from_dict,
    to_dict,
)
from sapf_ray.data import open_source
from sapf_ray.data.base import SOURCES
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.evaluation.classifiers import CLASSIFIERS
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import METRICS, from_real_images, requested
from sapf_ray.finetune.adapter import add_adapter
from sapf_ray.methods import METHODS, find_method
from sapf_ray.models.families import FAMILIES
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.card_gather import gather
from sapf_ray.privacy.events import exponential_event, gaussian_event
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan, plan_events
from sapf_ray.report.tables import ledger_table
from sapf_ray.saliency.scores import SCORES, Public
from sapf_ray.saliency.selection import Pass, score_records
from sapf_ray.tune.summary import score_columns
from tests.evaluation.test_protocol import write_digits
from tests.tiny import save_latents

MOST_LINES = 30
PLUGINS = Path(__file__).parent / "plugins"
TABLES: tuple[Any, ...] = (
    ACCOUNTANTS,
    CLASSIFIERS,
    FAMILIES,
    METHODS,
    METRICS,
    SCORES,
    SOURCES,
)


@pytest.fixture
def plugin(request, monkeypatch) -> Iterator[str]:
    """Loads the plugin that the test's marker names, and takes its rows away afterwards."""
    name = f"tests.plugins.{request.param}"
    before = [list(table) for table in TABLES]
    monkeypatch.setenv(registry.PLUGINS, "")
    registry.load_plugins([name])
    yield name
    for table, rows in zip(TABLES, before, strict=True):
        for row in [row for row in table if row not in rows]:
            del table[row]
    registry._loaded.discard(name)
    sys.modules.pop(name, None)


def uses(name: str) -> Any:
    return pytest.mark.parametrize("plugin", [name], indirect=True)


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_plugin_is_one_short_file(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_without_plugins_nothing_is_there():
    added = {
        "f_score",
        "prv",
        "stripes",
        "ffa-lora",
        "fisher",
        "magnitude",
        "logistic",
        "OwnPipeline",
    }
    assert not added & {name for table in TABLES for name in table}


@uses("metric")
def test_a_metric(plugin, tmp_path, ray_cluster):
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    config = EvaluationConfig(epochs=1, batch_size=16)
    inputs = Inputs(
        synthetic_dir=str(tmp_path), source=source, resolution=16, config=config, seed=0
    )
    row = METRICS["f_score"]
    alike = row.compute(inputs.restricted_to(row.reads))
    known = {name: 0.5 for name in requested(config) if name not in ("f_score", "fid_glyph")}
    scores = evaluate_on_cluster(
        tmp_path, source, resolution=16, config=config, seed=0, known=known
    )
    assert 0.2 < scores["f_score"] < 1
    assert scores["f_score"] == pytest.approx(alike, abs=1e-2) and scores["accuracy"] == 0.5
    assert "f_score" in from_real_images(scores), "its row says that it reads real images"
    assert [c.header for c in score_columns([{"f_score": 1.0}])] == ["accuracy %", "F score %"]


@uses("data_set")
def test_a_data_set(plugin):
    source = open_source(DataConfig(source="stripes"))
    images, labels = source.read("train", np.arange(4), resolution=8)
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 0, 1]
    assert (images[0] == images[0][:1]).all() and (images[1] == images[1][:, :1]).all()
    assert (source.name, source.n_train) == ("stripes", len(source.labels("train")))
    assert "stripes" in registry.names("data.source")


@uses("method")
def test_a_method(plugin, tiny_pipeline):
    config = of_overrides(find_method("ffa-lora").overrides)
    assert make_plan(config, 1000).selection is None, "every matrix is kept"
    denoiser = load_pipeline(str(tiny_pipeline)).unet
    matrices = list(candidate_pool(denoiser))
    add_adapter(denoiser, matrices, config=config.finetune, seed=0)
    trained = [name for name, p in denoiser.named_parameters() if p.requires_grad]
    assert len(trained) == len(matrices) and all("lora_B" in name for name in trained)


def of_overrides(overrides: Mapping[str, Any]) -> RunConfig:
    nested = to_dict(RunConfig())
    for key, value in {"finetune.batch_size": 64, "finetune.steps": 5, **overrides}.items():
        section, _, field = key.rpartition(".")
        nested[section][field] = value
    return from_dict(nested)


@uses("accountant")
def test_an_accountant(plugin, tmp_path):
    config = of_overrides({"privacy.accountant": "prv", "privacy.epsilon": 2.0})
    plan = make_plan(config, 1000)
    assert (plan.accountant, plan.non_private) == ("prv", False)
    assert 1.9 < plan.composed_epsilon <= 2
    by_pld = compose_epsilon(
        [(event, n) for _, event, n in plan_events(plan)], plan.delta, accountant="pld"
    )
    assert plan.composed_epsilon == pytest.approx(by_pld, rel=0.02)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    ledger.record("selection", plan.selection.event(), "id", "selection")
    assert "ε (PRV)" in printed(ledger) and "n/a" not in printed(ledger)
    text = privacy_card(gather(plan, ledger, config, model_name="m", data_name="d"))
    assert "(PRV accountant)" in text and "by the PLD accountant" in text


@uses("accountant")
def test_an_accountant_that_does_not_know_a_mechanism(plugin, tmp_path):
    """It is refused as the plan's own, and does not disturb runs that chose another."""
    chosen = {"saliency.mechanism": "exponential", "privacy.epsilon": 2.0}
    with pytest.raises(ConfigError, match=r"cannot price exponential .*; pld or rdp can"):
        make_plan(of_overrides({**chosen, "privacy.accountant": "prv"}), 1000)
    plan = make_plan(of_overrides({**chosen, "privacy.accountant": "rdp"}), 1000)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    ledger.record("selection", plan.selection.event(), "id", "selection")
    assert plan.selection.event() == exponential_event(25.0)
    assert printed(ledger).count("n/a") == 2  # the stage, and all together


@uses("score")
def test_a_score(plugin, tiny_pipeline, tmp_path):
    cache = save_latents(tmp_path, tiny_pipeline, 12)
    pipe = load_pipeline(str(tiny_pipeline))
    config = of_overrides({"saliency.score": "fisher"}).saliency
    work = Pass(
        model=ModelConfig(path=str(tiny_pipeline)),
        cache=cache,
        config=config,
        key=NoiseKey.create(1),
    )
    everyone = score_records(pipe, np.arange(12), work)
    without_one = score_records(pipe, np.arange(11), work)
    (both,), (less,) = everyone.values(), without_one.values()
    assert both.shape == (24,) and 0 < float((both - less).norm()) <= config.clipping_norm
    plan = make_plan(of_overrides({"saliency.score": "fisher", "privacy.accountant": "rdp"}), 1000)
    assert plan.selection.event() == gaussian_event(25.0)


@uses("data_free_score")
def test_a_data_free_score(plugin, tiny_pipeline):
    config = of_overrides({"saliency.score": "magnitude", "privacy.accountant": "rdp"})
    assert make_plan(config, 1000).selection is None, "it costs nothing"
    denoiser = load_pipeline(str(tiny_pipeline)).unet
    pool = candidate_pool(denoiser)
    public = Public(denoiser=denoiser, pool=pool, n=8, rounds=1, seed=0)
    values = SCORES["magnitude"].data_free(public)
    assert values.tolist() == [float(m.weight.abs().mean()) for m in pool.values()]


@uses("classifier")
def test_a_classifier(plugin, tmp_path, ray_cluster):
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    config = EvaluationConfig(epochs=20, batch_size=16, classifiers=["logistic"])
    scores = evaluate_on_cluster(tmp_path, source, resolution=16, config=config, seed=0)
    assert scores["accuracy"] == scores["accuracy_logistic"] > 0.3


@pytest.fixture
def own_model(tiny_pipeline, tmp_path) -> Path:
    """The tiny pipeline under the name of a class of the user's own."""
    path = tmp_path / "own"
    shutil.copytree(tiny_pipeline, path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "OwnPipeline"}))
    return path


def test_a_model_of_an_unknown_family_is_refused(own_model):
    with pytest.raises(DataError, match="is a OwnPipeline; must be one of"):
        PublicModel.open(ModelConfig(path=str(own_model)))


@uses("model_family")
def test_a_model_family(plugin, own_model, tiny_pipeline):
    model = PublicModel.open(ModelConfig(path=str(own_model)))
    pipe = load_pipeline(str(own_model))
    assert type(pipe).__name__ == "OwnPipeline" and model.resolution == 8
    assert list(model.pool("qkv")) == list(candidate_pool(pipe.unet))


def printed(ledger: Ledger) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(ledger_table(ledger))
    return console.export_text()
